"""Computes what transformers says of the tiny models: `python -m tests.save_oracles [NAME ...]`.

Needs the extra `hf`. Each oracle is `tests/oracles/NAME.npz`: logits of the last tokens, and the
experts of every token in every MoE layer, sorted.
"""

import pathlib
import sys
import tempfile
from typing import Any

import numpy as np

from tests.hf_families import CASES, ORACLES, Case, write_model


def load_in_torch(directory: pathlib.Path) -> Any:
    """The model in transformers, in float32, with attention and experts written out."""
    import transformers

    name = "AutoModelForCausalLM"
    model = getattr(transformers, name).from_pretrained(
        directory, dtype="float32", attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


def record_experts(model: Any) -> list[np.ndarray]:
    """A list that gets the experts of every token in each MoE layer when the model runs."""
    import torch

    found: list[np.ndarray] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        given = output if isinstance(output, tuple) else (output,)
        if type(module).__name__ == "Llama4Router":  # scores of all experts, 0 of the others
            given = (given[0].topk(module.top_k).indices,)
        for one in given:
            if isinstance(one, torch.Tensor) and one.dtype == torch.int64:
                found.append(np.sort(one.reshape(-1, one.shape[-1]).numpy(), axis=-1))

    for module in model.modules():
        if type(module).__name__.endswith(("Router", "Gate")):
            module.register_forward_hook(keep)
    return found


def compute(case: Case) -> dict[str, np.ndarray]:
    """The oracle of a case."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        model = load_in_torch(write_model(pathlib.Path(folder), case))
    experts = record_experts(model)
    with torch.no_grad():
        logits = model(torch.from_numpy(case.tokens()).long()).logits.numpy()
    oracle = {"logits": logits[:, -4:]}
    return oracle | ({"experts": np.stack(experts).astype(np.int16)} if experts else {})


def main(names: list[str]) -> None:
    """Saves the oracles of these cases, or of all."""
    ORACLES.mkdir(exist_ok=True)
    for name in names or CASES:
        np.savez_compressed(ORACLES / f"{name}.npz", **compute(CASES[name]))
        print(name)


if __name__ == "__main__":
    main(sys.argv[1:])
