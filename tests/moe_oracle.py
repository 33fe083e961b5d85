"""An MoE block in float64, written for readers and not for speed.

It loops over groups, tokens and choices, and shares no code with `moe_jax`. Settings come from
the attributes and class names of parts; everything else is NumPy. Jitter, noise, dropout and the
random queue are left out: other tests check their properties.
"""

import functools
import itertools
import math
from fractions import Fraction
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

QUEUES = {
    "TokenMajor": "token_major",
    "ChoiceMajor": "choice_major",
    "BatchPrioritized": "batch_prioritized",
    "ByProbability": "probability",
}
SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
CONVENTIONS = {
    "LoadBalance": "megatron",
    "SwitchLoadBalance": "switch",
    "FlaxformerLoadBalance": "flaxformer",
    "HuggingFaceLoadBalance": "huggingface",
}


def kind(part):
    """The name of a part's class."""
    return type(part).__name__


def load_balance(config):
    """Convention and scope of the block's load-balance loss, or the defaults if it has none."""
    for loss in config.losses:
        if kind(loss) in CONVENTIONS:
            return CONVENTIONS[kind(loss)], loss.scope
    return "megatron", "global"


def best_first(values, count):
    """Indices of the largest values, best first; ties go to the lower index."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def softmax(values):
    shifted = np.exp(np.asarray(values) - np.max(values))
    return shifted / shifted.sum()


def sigmoid(values):
    return 1 / (1 + np.exp(-np.asarray(values)))


def route_token(x_M, router_ME, num_selected, config, bias_E=None, logit_bias_E=None):
    """Logits, probabilities, choices and gates of one token.

    Args:
      x_M: the token.
      router_ME: weights of its logits.
      num_selected: K.
      config: a `TokenChoice`.
      bias_E: bias of the selection.
      logit_bias_E: bias of the logits.
    """
    num_experts = router_ME.shape[1]
    logits = [float(np.dot(x_M, router_ME[:, e])) for e in range(num_experts)]
    if logit_bias_E is not None:
        logits = [logit + float(bias) for logit, bias in zip(logits, logit_bias_E, strict=True)]
    scores = sigmoid(logits) if kind(config.score) == "Sigmoid" else softmax(logits)
    probs = scores / scores.sum()
    after_topk = kind(config.score) == "SoftmaxOverSelected"

    worth = np.array(logits if after_topk else scores)
    if bias_E is not None:
        worth = worth + np.asarray(bias_E, np.float64)
    limit = config.groups
    if limit is not None:
        size = num_experts // limit.num_groups
        groups = [worth[g * size : (g + 1) * size] for g in range(limit.num_groups)]
        summed = 2 if limit.worth == "top2_sum" else 1
        group_worth = [sum(sorted(group)[-summed:]) for group in groups]
        allowed = best_first(group_worth, limit.num_selected)
        worth = np.array([w if e // size in allowed else -np.inf for e, w in enumerate(worth)])
    chosen = best_first(worth, num_selected)

    gates = softmax([logits[e] for e in chosen]) if after_topk else scores[chosen]
    if config.renormalize:
        gates = gates / gates.sum()
    return logits, probs, chosen, gates * config.scaling_factor


def capacity(tokens, num_experts, num_selected, factor, config):
    """Slots per expert in a group, in exact arithmetic."""
    if factor == 0:
        return math.inf
    if config.slots:
        return config.slots
    per_choice = Fraction(tokens, num_experts)
    mean = per_choice * num_selected if config.per == "assignment" else per_choice
    if config.round_mean_up:
        mean = Fraction(math.ceil(mean))
    rounding = {"ceil": math.ceil, "floor": math.floor, "nearest": round}[config.rounding]
    slots = rounding(mean * Fraction(str(factor)))
    if config.per == "choice":
        slots *= num_selected
    while slots % config.multiple_of:
        slots += 1
    return max(slots, config.minimum)


def queue(order, probs_SE, gate_SK):
    """The (token, choice) pairs of a group in serving order."""
    tokens, choices = gate_SK.shape
    if order == "token_major":
        return [(s, k) for s in range(tokens) for k in range(choices)]
    if order == "choice_major":
        return [(s, k) for k in range(choices) for s in range(tokens)]
    if order == "batch_prioritized":
        by_worth = sorted(range(tokens), key=lambda s: (-max(probs_SE[s]), s))
        return [(s, k) for k in range(choices) for s in by_worth]
    if order == "probability":
        pairs = [(s, k) for s in range(tokens) for k in range(choices)]
        return sorted(pairs, key=lambda pair: (-gate_SK[pair], pair))
    raise ValueError(order)


def serve(index_SK, pairs, slots, valid_S):
    """Serves the (token, choice) pairs of a group in order.

    Returns:
      Which choices find a slot, and the slot's index (0 for the others).
    """
    used = {}
    kept_SK, slot_SK = np.zeros(index_SK.shape, bool), np.zeros(index_SK.shape, int)
    for s, k in pairs:
        expert = index_SK[s, k]
        if valid_S[s] and used.get(expert, 0) < slots:
            kept_SK[s, k], slot_SK[s, k] = True, used.get(expert, 0)
            used[expert] = used.get(expert, 0) + 1
    return kept_SK, slot_SK


def gelu(values):
    return np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in values])


def gelu_tanh(values):
    return np.array(
        [0.5 * v * (1 + math.tanh(SQRT_2_OVER_PI * (v + 0.044715 * v**3))) for v in values]
    )


def silu(values):
    return values * sigmoid(values)


ACTIVATIONS = {
    "Relu": lambda values: np.maximum(values, 0),
    "Gelu": gelu,
    "GeluTanh": gelu_tanh,
    "Silu": silu,
    "SwiGLU": silu,
    "GeGLU": gelu,
    "GeGLUTanh": gelu_tanh,
}


def ffn_row(x_M, weights, activation):
    """Applies one FFN to one row."""
    inner = x_M @ weights["wi"] + weights.get("bi", 0)
    if kind(activation) == "ClampedSwiGLU":
        gate = np.minimum(x_M @ weights["wg"] + weights.get("bg", 0), activation.limit)
        up = np.maximum(np.minimum(inner, activation.limit), -activation.limit)
        hidden = (up + 1) * gate * sigmoid(activation.alpha * gate)
        return hidden @ weights["wo"] + weights.get("bo", 0)
    act = ACTIVATIONS[kind(activation)]
    if "wg" in weights:
        hidden = act(x_M @ weights["wg"] + weights.get("bg", 0)) * inner
    else:
        hidden = act(inner)
    return hidden @ weights["wo"] + weights.get("bo", 0)


def relu_experts(x_TM, weights, index_TK, gate_TK, kept_TK, dy_TM):
    """Gated sums of two-matrix ReLU experts with biases, and the gradients of sum(y * dy) by hand.

    Returns:
      The output [T, M], and gradients by name: of `x`, `gate` and every weight.
    """
    y_TM = np.zeros_like(x_TM)
    grads = {name: np.zeros_like(value) for name, value in weights.items()}
    grads |= {"x": np.zeros_like(x_TM), "gate": np.zeros_like(gate_TK)}
    for t, k in zip(*np.nonzero(kept_TK), strict=True):
        e, x, gate, dy = index_TK[t, k], x_TM[t], gate_TK[t, k], dy_TM[t]
        inner = x @ weights["wi"][e] + weights["bi"][e]
        hidden = np.maximum(inner, 0)
        out = hidden @ weights["wo"][e] + weights["bo"][e]
        y_TM[t] += gate * out

        grads["gate"][t, k] = dy @ out
        d_inner = weights["wo"][e] @ (gate * dy) * (inner > 0)
        grads["wo"][e] += np.outer(hidden, gate * dy)
        grads["bo"][e] += gate * dy
        grads["wi"][e] += np.outer(x, d_inner)
        grads["bi"][e] += d_inner
        grads["x"][t] += weights["wi"][e] @ d_inner
    return y_TM, grads


def load_balance_loss(index_TK, probs_TE, units, convention):
    """The loss of one scope; `units` are lists of valid tokens that are averaged together."""
    num_experts, num_selected = probs_TE.shape[1], index_TK.shape[1]
    total = sum(len(unit) for unit in units)
    loss = 0.0
    for unit in units:
        if not unit:
            continue
        counted = 1 if convention == "switch" else num_selected
        share = np.zeros(num_experts)
        for t in unit:
            for k in range(counted):
                share[index_TK[t, k]] += 1 / len(unit)
        if convention == "megatron":
            share /= num_selected
        mean_prob = sum(probs_TE[t] for t in unit) / len(unit)
        loss += num_experts * float(share @ mean_prob) * len(unit) / total
    return loss


def balance_units(scope, batch, length, group_size, valid_T):
    """The lists of valid tokens over which a balance loss averages."""
    size = {"group": group_size, "sequence": length}.get(scope, batch * length)
    starts = range(0, batch * length, size)
    return [[t for t in range(start, start + size) if valid_T[t]] for start in starts]


def moe_block(params, x_BLM, config, *, capacity_factor=None, valid_BL=None, bias_E=None):
    """The whole block; returns its output and everything about its routing.

    Without a `capacity_factor`, the factor of training applies.
    """
    params = jax.tree.map(lambda value: np.asarray(value, np.float64), params)
    x_BLM = np.asarray(x_BLM, np.float64)
    batch, length, _ = x_BLM.shape
    factor = config.capacity.train_factor if capacity_factor is None else capacity_factor
    group_size = config.group_size or length
    E, K = config.num_experts, config.num_selected_experts
    T = batch * length
    x_TM = x_BLM.reshape(T, -1)
    valid_T = np.ones(T, bool) if valid_BL is None else np.asarray(valid_BL).reshape(T)

    logits_TE, probs_TE = np.zeros((T, E)), np.ones((T, E)) / E
    index_TK, gate_TK = np.zeros((T, K), int), np.full((T, K), config.router.scaling_factor)
    unbiased_TK = np.zeros((T, K), int)
    if E > 1:
        for t in range(T):
            logits_TE[t], probs_TE[t], index_TK[t], gate_TK[t] = route_token(
                x_TM[t], params["router"]["weight"], K, config.router, bias_E,
                params["router"].get("bias"),
            )  # fmt: skip
            unbiased_TK[t] = best_first(probs_TE[t], K)

    slots = capacity(group_size, E, K, factor, config.capacity)
    kept_TK = np.zeros((T, K), bool)
    for start in range(0, T, group_size):
        group = slice(start, start + group_size)
        order = QUEUES[kind(config.capacity.queue)] if factor else "token_major"
        pairs = queue(order, probs_TE[group], gate_TK[group])
        kept_TK[group], _ = serve(index_TK[group], pairs, slots, valid_T[group])

    y_TM = np.zeros_like(x_TM)
    for t in range(T):
        for k in range(K):
            if kept_TK[t, k]:
                expert = {n: w[index_TK[t, k]] for n, w in params["experts"].items()}
                y_TM[t] += gate_TK[t, k] * ffn_row(x_TM[t], expert, config.activation)
        if config.shared_expert_dim and valid_T[t]:
            shared = params["shared"]
            scale = sigmoid(x_TM[t] @ shared["gate"]) if config.shared_expert_gate else 1
            y_TM[t] += scale * ffn_row(x_TM[t], shared, config.activation)

    real = [t for t in range(T) if valid_T[t]]
    count = max(len(real), 1)
    assigned_KE, kept_KE = np.zeros((K, E), int), np.zeros((K, E), int)
    assigned_BE = np.zeros((batch, E), int)
    for t in real:
        for k in range(K):
            assigned_KE[k, index_TK[t, k]] += 1
            assigned_BE[t // length, index_TK[t, k]] += 1
            kept_KE[k, index_TK[t, k]] += kept_TK[t, k]
    # Megatron's loss counts the best experts by score, ignoring biases and groups.
    convention, scope = load_balance(config)
    by_scores = convention == "megatron"
    balanced_TK = unbiased_TK if by_scores else index_TK
    balanced_KE = np.zeros((K, E), int)
    for t, k in itertools.product(real, range(K)):
        balanced_KE[k, balanced_TK[t, k]] += 1
    loads = assigned_KE.sum(axis=0)
    return SimpleNamespace(
        y_BLM=y_TM.reshape(x_BLM.shape),
        index_TK=index_TK,
        balanced_TK=balanced_TK,
        balanced_KE=balanced_KE,
        gate_TK=gate_TK,
        probs_TE=probs_TE,
        kept_TK=kept_TK,
        valid_T=valid_T,
        load_balance_loss=load_balance_loss(
            balanced_TK,
            probs_TE,
            balance_units(scope, batch, length, group_size, valid_T),
            convention,
        ),
        router_loss=0.0,
        router_z_loss=sum(np.log(np.exp(logits_TE[t]).sum()) ** 2 for t in real) / count,
        assigned_KE=assigned_KE,
        kept_KE=kept_KE,
        assigned_BE=assigned_BE,
        mean_prob_E=sum((probs_TE[t] for t in real), np.zeros(E)) / count,
        num_tokens=len(real),
        router_entropy=-sum(float(probs_TE[t] @ np.log(probs_TE[t])) for t in real) / count,
        max_logit=max((float(np.abs(logits_TE[t]).max()) for t in real), default=0.0),
        max_violation=loads.max() / loads.mean() - 1 if real else 0.0,
        dropped_fraction_K=np.array(
            [1 - kept_KE[k].sum() / len(real) if real else 0.0 for k in range(K)]
        ),
    )


def dense_block(params, x_TM, config, fixed):
    """The block as one smooth function: every expert computes every token.

    Discrete decisions (choices, drops, padding, units of the balance loss) are constants, so
    automatic differentiation gives every gradient of the block.

    Args:
      params: the block's tree of parameters.
      x_TM: all tokens.
      config: the block's settings.
      fixed: arrays made by `decisions`.

    Returns:
      The output [T, M], the load-balance loss and the z-loss, in the dtype of `params`.
    """
    E, K, router = config.num_experts, config.num_selected_experts, config.router
    convention, _ = load_balance(config)
    chosen_TKE, balanced_TKE, kept_TK, valid_T, unit_UT = fixed

    logits_TE = jnp.zeros((len(x_TM), 1), x_TM.dtype)
    if E > 1:
        logits_TE = x_TM @ params["router"]["weight"] + params["router"].get("bias", 0)
    exp_TE = jnp.exp(logits_TE)
    sigmoids = kind(router.score) == "Sigmoid" and E > 1
    scores_TE = exp_TE / (1 + exp_TE) if sigmoids else exp_TE / exp_TE.sum(1)[:, None]
    probs_TE = scores_TE / scores_TE.sum(1)[:, None]
    gate_TK = (scores_TE[:, None, :] * chosen_TKE).sum(-1)
    # A softmax over the selected logits is a softmax over all of them, renormalized.
    if router.renormalize or kind(router.score) == "SoftmaxOverSelected":
        gate_TK = gate_TK / gate_TK.sum(1)[:, None]
    gate_TK = gate_TK * router.scaling_factor * kept_TK

    def act(values):
        name = kind(config.activation)
        if name == "Relu":
            return values * (values > 0)
        if name in ("Silu", "SwiGLU"):
            return values / (1 + jnp.exp(-values))
        if name in ("GeluTanh", "GeGLUTanh"):
            return values * (1 + jnp.tanh(SQRT_2_OVER_PI * (values + 0.044715 * values**3))) / 2
        return values * (1 + jax.scipy.special.erf(values / math.sqrt(2))) / 2

    def ffn(w):
        """Applies an FFN to x[T, M]; weights may have a leading dim of experts."""
        biases = {name: w[name][..., None, :] for name in w if name[0] == "b"}
        inner = x_TM @ w["wi"] + biases.get("bi", 0)
        if "wg" in w:
            hidden = act(x_TM @ w["wg"] + biases.get("bg", 0)) * inner
        else:
            hidden = act(inner)
        return hidden @ w["wo"] + biases.get("bo", 0)

    y_ETM = ffn(params["experts"])
    y_TM = ((gate_TK[:, :, None] * chosen_TKE).sum(1).T[:, :, None] * y_ETM).sum(0)
    if config.shared_expert_dim:
        shared = params["shared"]
        scale = 1 / (1 + jnp.exp(-x_TM @ shared["gate"])) if config.shared_expert_gate else 1
        y_TM += scale * ffn(shared) * valid_T[:, None]

    total = jnp.maximum(valid_T.sum(), 1)
    counted_TE = balanced_TKE[:, 0] if convention == "switch" else balanced_TKE.sum(1)
    divisor_U1 = jnp.maximum(unit_UT.sum(1), 1)[:, None] * (K if convention == "megatron" else 1)
    # Mean share times mean probability, weighted by the unit's size / total.
    balance = E * ((unit_UT @ counted_TE) / divisor_U1 * (unit_UT @ probs_TE)).sum() / total
    z_loss = (jnp.log(exp_TE.sum(1)) ** 2 * valid_T).sum() / total
    return y_TM, balance, z_loss


def decisions(decided, config, batch, length):
    """The constants of `dense_block`, from the result of `moe_block`."""
    (_, scope), group_size = load_balance(config), config.group_size or length
    units = balance_units(scope, batch, length, group_size, decided.valid_T)
    unit_UT = np.zeros((len(units), batch * length))
    for row, unit in zip(unit_UT, units, strict=True):
        row[unit] = 1
    one_hot = np.eye(config.num_experts)
    chosen_TKE, balanced_TKE = one_hot[decided.index_TK], one_hot[decided.balanced_TK]
    kept_TK, valid_T = decided.kept_TK.astype(float), decided.valid_T.astype(float)
    return chosen_TKE, balanced_TKE, kept_TK, valid_T, unit_UT


@functools.partial(jax.jit, static_argnames="config")
def _dense_gradients(params, x_TM, fixed, dy_TM, weights, config):
    def objective(params, x_TM):
        y_TM, balance, z_loss = dense_block(params, x_TM, config, fixed)
        return jnp.sum(y_TM * dy_TM) + weights[0] * balance + weights[1] * z_loss

    return jax.value_and_grad(objective, argnums=(0, 1))(params, x_TM)


def gradients(params, x_BLM, config, decided, dy_BLM, balance_weight=0.0, z_weight=0.0):
    """sum(y * dy) + weighted losses in float64, and its gradients.

    Returns:
      The value, gradients in the tree of `params`, and the gradient of the input.
    """
    batch, length, model_dim = x_BLM.shape
    with jax.enable_x64(True):
        value, (grads, dx_TM) = _dense_gradients(
            jax.tree.map(lambda value: np.asarray(value, np.float64), params),
            np.asarray(x_BLM, np.float64).reshape(-1, model_dim),
            decisions(decided, config, batch, length),
            np.asarray(dy_BLM, np.float64).reshape(-1, model_dim),
            np.array([balance_weight, z_weight]),
            config,
        )
    return float(value), jax.tree.map(np.asarray, grads), np.asarray(dx_TM).reshape(x_BLM.shape)


def rows_computed(group_sizes_E, tile, aligned):
    """Rows that a kernel computes for groups of these sizes, wasted rows included.

    Args:
      group_sizes_E: rows of each expert.
      tile: rows of a tile.
      aligned: whether tiles begin at multiples of their size (megablox, libtpu), instead of the
        first row of each expert (triton).
    """
    ends_E = np.cumsum(group_sizes_E)
    starts_E = ends_E - group_sizes_E
    if aligned:
        tiles_E = -(-ends_E // tile) - starts_E // tile
    else:
        tiles_E = -(-np.asarray(group_sizes_E) // tile)
    return int(tile * np.sum(np.where(group_sizes_E, tiles_E, 0)))
