"""Computes transformers' outputs for the tiny models: `python -m tests.save_oracles [NAME ...]`.

Needs the extra `hf`. Each oracle is `tests/oracles/NAME.npz`: logits of the last tokens; sorted
experts of every token in every MoE layer; logits of multi-token modules as "later".
"""

import json
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np

from moe_jax.interchange.read import CONFIG
from tests.hf_families import CASES, ORACLES, Case, write_model


def load_in_torch(directory: pathlib.Path) -> Any:
    """The model in transformers, in float32, with attention and experts written out."""
    import transformers

    settings = json.loads((directory / CONFIG).read_text())
    kind = "Seq2SeqLM" if settings.get("is_encoder_decoder") else "CausalLM"
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(
        directory, dtype="float32", attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


def run_in_torch(model: Any, case: Case, **settings: Any) -> Any:
    """The model's output for the tokens of a case."""
    import torch

    tokens, encoder = torch.from_numpy(case.tokens()).long(), case.encoder_tokens()
    if not encoder:
        return model(tokens, **settings)
    (read,) = encoder.values()
    return model(torch.from_numpy(read).long(), decoder_input_ids=tokens, **settings)


def saved_gradients(torch: Any, model: Any, folder: pathlib.Path) -> pathlib.Path:
    """Replaces a model's parameters by their gradients and saves it; returns the folder."""
    with torch.no_grad():
        for parameter in model.parameters():
            gradient = parameter.grad
            parameter.copy_(torch.zeros_like(parameter) if gradient is None else gradient)
    model.save_pretrained(folder)
    return folder


def at(tree: Any, path: tuple[str, ...]) -> Any:
    """The array at a path of a tree."""
    for name in path:
        tree = tree[name]
    return tree


def modules_in_torch(model: Any) -> Any:
    """The multi-token modules of a model loaded from a directory."""
    from transformers.modeling_layers import MtpModel

    first, depth = model.config.num_hidden_layers, model.config.num_mtp_layers
    # Where transformers expects the modules: it knows only the published number of layers.
    places = [rf"model\.layers\.{layer}\..*" for layer in range(first, first + depth)]
    model._keys_to_ignore_on_load_unexpected = places
    return MtpModel.from_pretrained(model).eval()


def later_logits(modules: Any, model: Any, tokens: Any) -> list[Any]:
    """Logits of module k for the token k + 1 ahead, [B, L - k, V]."""
    import torch

    hidden = model.model(tokens).last_hidden_state
    found = []
    for k in range(len(modules.layers)):
        tokens = tokens[:, 1:]
        positions = torch.arange(tokens.shape[1])[None] + k + 1
        hidden = modules.forward_layer(k, hidden[:, :-1], positions, None, input_ids=tokens)
        found.append(model.lm_head(hidden))
    return found


def record_experts(model: Any) -> list[np.ndarray]:
    """A list that collects the experts of every token in each MoE layer when the model runs."""
    import torch

    found: list[np.ndarray] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        given = output if isinstance(output, tuple) else (output,)
        if type(module).__name__ == "Llama4Router":  # scores of all experts, 0 of the others
            given = (given[0].topk(module.top_k).indices,)
        if type(module).__name__ == "SwitchTransformersTop1Router":  # 1 at the expert if kept
            given = (given[2].argmax(-1, keepdim=True),)
        for one in given:
            if isinstance(one, torch.Tensor) and one.dtype == torch.int64:
                found.append(np.sort(one.reshape(-1, one.shape[-1]).numpy(), axis=-1))

    for module in model.modules():
        if type(module).__name__.endswith(("Router", "Gate")):
            module.register_forward_hook(keep)
        if type(module).__name__ == "DbrxExperts":  # its router returns only logits
            module.register_forward_pre_hook(lambda module, inputs: keep(module, None, inputs))
    return found


def compute(case: Case) -> dict[str, np.ndarray]:
    """The oracle of a case."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        model = load_in_torch(write_model(pathlib.Path(folder), case))
        if case.settings.get("num_nextn_predict_layers"):
            modules = modules_in_torch(model)
    experts = record_experts(model)
    with torch.no_grad():
        logits = run_in_torch(model, case).logits.numpy()
    oracle = {"logits": logits[:, -4:]}
    if experts:
        oracle["experts"] = np.stack(experts).astype(np.int16)
    if case.settings.get("num_nextn_predict_layers"):
        with torch.no_grad():
            later = later_logits(modules, model, torch.from_numpy(case.tokens()).long())
        oracle["later"] = np.stack([one[:, -4:].numpy() for one in later])
    return oracle


def main(names: list[str]) -> None:
    """Saves the oracles of these cases, or of all."""
    ORACLES.mkdir(exist_ok=True)
    for name in names or CASES:
        np.savez_compressed(ORACLES / f"{name}.npz", **compute(CASES[name]))
        print(name)


if __name__ == "__main__":
    main(sys.argv[1:])
