"""The demo model as plain functions over a dictionary of weights, for training and evaluation on one device.

Computes what transformers' GlmMoeDsaForCausalLM computes; the weights carry the hub's names, so the dictionary is the
checkpoint. Token-wise work is two functions a layer over flat tokens (`attention_inputs`, `attention_outputs`), so that
they can be compiled once for every sequence length; attention stands between them. Called by train.py and evaluate.py
on one thread and the current stream. Nothing here is used by the serving path.

Shapes: N = B * T flat tokens, B sequences, T tokens each, D hidden, A heads, Q = 96 (32 nope + 64 rope),
V = 32 value, I = 16 index heads, K = 128 index dim, E experts, S sampled query rows a sequence.
`dtype` is what matrices are multiplied in; norms, softmax, router and residual are fp32.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

EPS = 1e-6
VOCAB, D = 264, 192
NUM_LAYERS, NUM_DENSE_LAYERS = 4, 1
NUM_HEADS, NOPE_DIM, ROPE_DIM, V_DIM = 4, 32, 64, 32
QK_DIM = NOPE_DIM + ROPE_DIM
Q_RANK, KV_RANK = 96, 512
DENSE_INNER, EXPERT_INNER = 512, 128
NUM_EXPERTS, EXPERTS_PER_TOKEN = 4, 2
INDEX_HEADS, INDEX_DIM, TOP_K = 16, 128, 128
INDEXER_TYPES = ("full", "full", "shared", "full")
ROPE_THETA = 1e6
# Elements of a products tensor [B, rows, I, T] that index scoring may hold at once.
MAX_SCORE_ELEMENTS = 2**30

INPUT_WEIGHTS = ("input_layernorm", "self_attn.q_", "self_attn.kv_")
OUTPUT_WEIGHTS = ("self_attn.o_proj", "post_attention_layernorm", "mlp")

Weights = dict[str, Tensor]
# (layer state, B, T) -> which keys each query may see, bool [B, T, T], causal.
Selector = Callable[["LayerState", int, int], Tensor]


@dataclass(slots=True)
class LayerState:
    """What one layer's attention read: inputs of its indexer and its queries and keys, flat over tokens."""

    weights: Weights
    normed_ND: Tensor
    q_latent_NR: Tensor
    q_NAQ: Tensor
    k_NAQ: Tensor
    cos: Tensor
    sin: Tensor
    allowed: Tensor | None = None


@dataclass(slots=True)
class Output:
    """Final hidden state [N, D], each layer's state (kept on request), share of tokens each expert got by layer."""

    hidden_ND: Tensor
    states: list[LayerState] = field(default_factory=list)
    expert_loads: list[Tensor] = field(default_factory=list)


def weight_shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint by hub name."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, D)}
    for i, kind in enumerate(INDEXER_TYPES):
        layer = _attention_shapes() | (_indexer_shapes() if kind == "full" else {})
        layer |= _mlp_shapes("mlp.", DENSE_INNER) if i < NUM_DENSE_LAYERS else _moe_shapes()
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (D,), "lm_head.weight": (VOCAB, D)}


def _attention_shapes() -> dict[str, tuple[int, ...]]:
    return {
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
        "self_attn.q_a_proj.weight": (Q_RANK, D),
        "self_attn.q_a_layernorm.weight": (Q_RANK,),
        "self_attn.q_b_proj.weight": (NUM_HEADS * QK_DIM, Q_RANK),
        "self_attn.kv_a_proj_with_mqa.weight": (KV_RANK + ROPE_DIM, D),
        "self_attn.kv_a_layernorm.weight": (KV_RANK,),
        "self_attn.kv_b_proj.weight": (NUM_HEADS * (NOPE_DIM + V_DIM), KV_RANK),
        "self_attn.o_proj.weight": (D, NUM_HEADS * V_DIM),
    }


def _indexer_shapes() -> dict[str, tuple[int, ...]]:
    return {
        "self_attn.indexer.wq_b.weight": (INDEX_HEADS * INDEX_DIM, Q_RANK),
        "self_attn.indexer.wk.weight": (INDEX_DIM, D),
        "self_attn.indexer.k_norm.weight": (INDEX_DIM,),
        "self_attn.indexer.k_norm.bias": (INDEX_DIM,),
        "self_attn.indexer.weights_proj.weight": (INDEX_HEADS, D),
    }


def _mlp_shapes(prefix: str, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}gate_proj.weight": (inner, D),
        f"{prefix}up_proj.weight": (inner, D),
        f"{prefix}down_proj.weight": (D, inner),
    }


def _moe_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "mlp.gate.weight": (NUM_EXPERTS, D),
        "mlp.gate.e_score_correction_bias": (NUM_EXPERTS,),
    }
    for e in range(NUM_EXPERTS):
        shapes |= _mlp_shapes(f"mlp.experts.{e}.", EXPERT_INNER)
    return shapes | _mlp_shapes("mlp.shared_experts.", EXPERT_INNER)


def init_weights(seed: int, device: torch.device) -> Weights:
    """Fresh fp32 weights; all but the router's correction biases require gradients."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in weight_shapes().items():
        tensor = _init_tensor(name, shape, generator).to(device)
        weights[name] = tensor.requires_grad_(not name.endswith("e_score_correction_bias"))
    return weights


def _init_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    std = shape[1] ** -0.5
    if "embed_tokens" in name:
        std = 0.5
    elif name.endswith(("o_proj.weight", "down_proj.weight")):
        std /= math.sqrt(2 * NUM_LAYERS)
    elif name == "lm_head.weight":
        std = 0.02
    return torch.randn(shape, generator=generator) * std


def layer_weights(weights: Weights, layer: int) -> Weights:
    """The tensors of one layer, by their names inside the layer."""
    prefix = f"model.layers.{layer}."
    return {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}


def _only(weights: Weights, prefixes: tuple[str, ...]) -> Weights:
    return {name: t for name, t in weights.items() if name.startswith(prefixes)}


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in x's dtype."""
    return F.linear(x, weight.to(x.dtype))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm over the last dimension, computed in fp32, returned in x's dtype."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + EPS) * weight).to(x.dtype)


def rope_tables(num_sequences: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [N, ROPE_DIM / 2], of positions 0 .. length - 1 repeated for each sequence."""
    exponents = torch.arange(0, ROPE_DIM, 2, device=device, dtype=torch.float32) / ROPE_DIM
    positions = torch.arange(length, device=device, dtype=torch.float32)
    # In the order transformers rounds it: at position 1,500 the other order moves angles by 1e-4.
    angles = (positions[:, None] * (1.0 / ROPE_THETA**exponents)).repeat(num_sequences, 1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved rope over the last dimension of [N, heads, ROPE_DIM]; pairs come out de-interleaved, as in transformers."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), -1).to(x.dtype)


def attention_inputs(
    x_ND: Tensor, cos: Tensor, sin: Tensor, w: Weights, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Normed hidden state, query latent, and expanded q, k [N, A, Q] and v [N, A, V], all in dtype."""
    h = rms_norm(x_ND, w["input_layernorm.weight"]).to(dtype)
    q_latent = linear(h, w["self_attn.q_a_proj.weight"])
    q_latent = rms_norm(q_latent, w["self_attn.q_a_layernorm.weight"])
    q = linear(q_latent, w["self_attn.q_b_proj.weight"]).view(-1, NUM_HEADS, QK_DIM)
    q_nope, q_rope = q.split((NOPE_DIM, ROPE_DIM), -1)
    latent, k_rope = linear(h, w["self_attn.kv_a_proj_with_mqa.weight"]).split(
        (KV_RANK, ROPE_DIM), -1
    )
    latent = rms_norm(latent, w["self_attn.kv_a_layernorm.weight"])
    kv = linear(latent, w["self_attn.kv_b_proj.weight"]).view(-1, NUM_HEADS, NOPE_DIM + V_DIM)
    k_nope, v = kv.split((NOPE_DIM, V_DIM), -1)
    k_rope = rotate(k_rope[:, None], cos, sin).expand(-1, NUM_HEADS, -1)
    q = torch.cat((q_nope, rotate(q_rope, cos, sin)), -1)
    return h, q_latent, q, torch.cat((k_nope, k_rope), -1), v.contiguous()


def attention_outputs(
    x_ND: Tensor, attended_NAV: Tensor, w: Weights, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Output projection, residuals, MLP or MoE. Returns the new fp32 residual and each expert's share of tokens [E]."""
    x_ND = x_ND + linear(attended_NAV.flatten(1).to(dtype), w["self_attn.o_proj.weight"]).float()
    h = rms_norm(x_ND, w["post_attention_layernorm.weight"])
    if "mlp.gate.weight" in w:
        out, load = moe(h, w, dtype)
    else:
        gate = linear(h.to(dtype), w["mlp.gate_proj.weight"])
        inner = F.silu(gate) * linear(h.to(dtype), w["mlp.up_proj.weight"])
        out, load = linear(inner, w["mlp.down_proj.weight"]), h.new_zeros(NUM_EXPERTS)
    return x_ND + out.float(), load


def route(h_ND: Tensor, w: Weights) -> tuple[Tensor, Tensor]:
    """Expert weights [N, E] fp32, zero where not chosen, and the 0/1 choice."""
    scores = torch.sigmoid(F.linear(h_ND.float(), w["mlp.gate.weight"]))
    choice = (scores.detach() + w["mlp.gate.e_score_correction_bias"]).topk(EXPERTS_PER_TOKEN, -1)
    chosen = torch.zeros_like(scores).scatter(1, choice.indices, 1.0)
    kept = scores * chosen
    return kept / (kept.sum(-1, keepdim=True) + 1e-20), chosen


def moe(h_ND: Tensor, w: Weights, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Routed experts plus the shared one, as one wide MLP whose inner blocks are scaled by the router."""
    names = [f"mlp.experts.{e}." for e in range(NUM_EXPERTS)] + ["mlp.shared_experts."]
    gate, up, down = (
        torch.cat([w[f"{name}{kind}_proj.weight"] for name in names], int(kind == "down"))
        for kind in ("gate", "up", "down")
    )
    expert_weights, chosen = route(h_ND, w)
    scales = torch.cat((expert_weights, torch.ones_like(expert_weights[:, :1])), 1)
    h = h_ND.to(dtype)
    inner = (F.silu(linear(h, gate)) * linear(h, up)).view(-1, len(names), EXPERT_INNER)
    inner = (inner * scales[..., None]).to(dtype)
    return linear(inner.flatten(1), down), chosen.mean(0)


def index_queries(
    q_latent_MR: Tensor, normed_MD: Tensor, cos: Tensor, sin: Tensor, w: Weights
) -> tuple[Tensor, Tensor]:
    """Index queries [M, I, K] and head weights [M, I] of any M tokens."""
    iq = linear(q_latent_MR, w["self_attn.indexer.wq_b.weight"]).view(-1, INDEX_HEADS, INDEX_DIM)
    head_weights = linear(normed_MD, w["self_attn.indexer.weights_proj.weight"])
    return rotate_first(iq, cos, sin), head_weights


def index_keys(normed_ND: Tensor, cos: Tensor, sin: Tensor, w: Weights) -> Tensor:
    """Index keys [N, K]: LayerNorm with bias, then rope."""
    ik = linear(normed_ND, w["self_attn.indexer.wk.weight"]).float()
    norm = w["self_attn.indexer.k_norm.weight"], w["self_attn.indexer.k_norm.bias"]
    ik = F.layer_norm(ik, (INDEX_DIM,), *norm, eps=EPS).to(normed_ND.dtype)
    return rotate_first(ik[:, None], cos, sin)[:, 0]


def rotate_first(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved rope on the first ROPE_DIM of the last dimension."""
    return torch.cat((rotate(x[..., :ROPE_DIM], cos, sin), x[..., ROPE_DIM:]), -1)


def weigh_heads(products_BSIT: Tensor, head_weights_BSI: Tensor) -> Tensor:
    """Sum over index heads of weight * relu(product), scaled, fp32 [B, S, T]."""
    scale = INDEX_HEADS**-0.5 * INDEX_DIM**-0.5
    weighted = products_BSIT.relu().float() * (head_weights_BSI.float() * scale)[..., None]
    return weighted.sum(2)


def index_scores(iq_BSIK: Tensor, ik_BTK: Tensor, head_weights_BSI: Tensor) -> Tensor:
    """Index scores [B, S, T] fp32, not masked."""
    rows = iq_BSIK.shape[1]
    products = iq_BSIK.flatten(1, 2) @ ik_BTK.transpose(1, 2)
    return weigh_heads(products.unflatten(1, (rows, INDEX_HEADS)), head_weights_BSI)


@torch.no_grad()
def select_by_indexer(state: LayerState, num_sequences: int, length: int) -> Tensor:
    """Selector: the TOP_K keys of highest index score for each query."""
    iq, hw = index_queries(state.q_latent_NR, state.normed_ND, state.cos, state.sin, state.weights)
    ik = index_keys(state.normed_ND, state.cos, state.sin, state.weights)
    iq, hw, ik = (t.unflatten(0, (num_sequences, length)) for t in (iq, hw, ik))
    selected = torch.zeros(num_sequences, length, length, dtype=torch.bool, device=ik.device)
    rows = max(16, MAX_SCORE_ELEMENTS // (num_sequences * INDEX_HEADS * length))
    for start in range(0, length, rows):
        end = min(start + rows, length)
        scores = index_scores(iq[:, start:end], ik[:, :end], hw[:, start:end])
        causal = causal_rows(start, end, end, scores.device)
        scores.masked_fill_(~causal, -torch.inf)
        picks = scores.topk(min(TOP_K, end), -1, sorted=False).indices
        selected[:, start:end].scatter_(2, picks, True)
        selected[:, start:end, :end] &= causal
    return selected


def select_random(state: LayerState, num_sequences: int, length: int) -> Tensor:
    """Selector for a negative control: TOP_K random keys for each query."""
    causal = causal_rows(0, length, length, state.normed_ND.device)
    scores = torch.rand(num_sequences, length, length, device=causal.device)
    picks = scores.masked_fill_(~causal, -1.0).topk(min(TOP_K, length), -1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(2, picks, True) & causal


def select_recent(state: LayerState, num_sequences: int, length: int) -> Tensor:
    """Selector for a negative control: the newest TOP_K keys."""
    causal = causal_rows(0, length, length, state.normed_ND.device)
    return causal.triu(1 - TOP_K).expand(num_sequences, -1, -1)


def causal_rows(start: int, end: int, num_keys: int, device: torch.device) -> Tensor:
    """The causal mask of queries start .. end - 1, bool [end - start, num_keys]."""
    rows = torch.arange(start, end, device=device)[:, None]
    return rows >= torch.arange(num_keys, device=device)


def attend(
    q_NAQ: Tensor, k_NAQ: Tensor, v_NAV: Tensor, num_sequences: int, allowed: Tensor | None
) -> Tensor:
    """Softmax attention over the allowed keys, or over all earlier ones; [N, A, V]."""
    if allowed is None:
        # The fastest kernel wants equal head dimensions; zeros in the values change nothing.
        v_NAV = F.pad(v_NAV, (0, QK_DIM - V_DIM))
    q, k, v = (x.unflatten(0, (num_sequences, -1)).transpose(1, 2) for x in (q_NAQ, k_NAQ, v_NAV))
    mask = None if allowed is None else allowed[:, None].expand(-1, NUM_HEADS, -1, -1)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
    return out[..., :V_DIM].transpose(1, 2).contiguous().flatten(0, 1)


class Forward:
    """The model's forward pass over a dictionary of weights.

    `compiled` compiles the token-wise functions; every call must then bring the same number of tokens.
    """

    def __init__(self, weights: Weights, dtype: torch.dtype, compiled: bool = False) -> None:
        self.weights = weights
        self.layers = [layer_weights(weights, i) for i in range(NUM_LAYERS)]
        # Each compiled function gets only what it reads, so that layers alike share one compilation.
        self.input_weights = [_only(w, INPUT_WEIGHTS) for w in self.layers]
        self.output_weights = [_only(w, OUTPUT_WEIGHTS) for w in self.layers]
        self.dtype = dtype
        compile_ = torch.compile(dynamic=False) if compiled else lambda function: function
        self.attention_inputs = compile_(attention_inputs)
        self.attention_outputs = compile_(attention_outputs)

    def __call__(
        self, tokens_BT: Tensor, selector: Selector | None = None, keep_states: bool = False
    ) -> Output:
        """Runs all layers; dense where there is no selector. States are kept detached from the graph."""
        num_sequences, length = tokens_BT.shape
        cos, sin = rope_tables(num_sequences, length, tokens_BT.device)
        x = F.embedding(tokens_BT.flatten(), self.weights["model.embed_tokens.weight"])
        output, allowed = Output(x), None
        for i, kind in enumerate(INDEXER_TYPES):
            h, q_latent, q, k, v = self.attention_inputs(
                x, cos, sin, self.input_weights[i], self.dtype
            )
            state = LayerState(self.layers[i], *(t.detach() for t in (h, q_latent, q, k)), cos, sin)
            if selector is not None and kind == "full":
                allowed = selector(state, num_sequences, length)
            state.allowed = allowed
            attended = attend(q, k, v, num_sequences, allowed)
            x, load = self.attention_outputs(x, attended, self.output_weights[i], self.dtype)
            output.expert_loads.append(load.detach())
            if keep_states:
                output.states.append(state)
        output.hidden_ND = x
        return output

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """fp32 logits [N, VOCAB] of final hidden states."""
        h = rms_norm(hidden_ND, self.weights["model.norm.weight"]).to(self.dtype)
        return linear(h, self.weights["lm_head.weight"]).float()
