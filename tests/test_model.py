"""quantize_model on plain pytrees: rules, paths, stacks, memory; then the messages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_w4a16
from jax_w4a16 import DEFAULT_RULES, QuantizedWeight, Rule, _model, _progress, quantize_model

K, N, LAYERS, T = 96, 32, 3, 24


def normal(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def tree():
    return {
        "embed": normal(50, K),
        "layers": {
            "up": {"weight": normal(LAYERS, K, N), "bias": normal(LAYERS, N)},
            "norm": normal(LAYERS, K),
        },
        "down": [normal(K, N, dtype=jnp.float16, seed=1), normal(N)],
        "step": jnp.zeros((2, 2), jnp.int32),
    }


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


def test_weights_are_quantised_and_the_rest_is_shared():
    model = tree()
    got = quantize_model(model, progress=False)
    equal(got["down"][0], jax_w4a16.quantize(model["down"][0]))
    assert got["down"][0].dtype == jnp.float16
    stack = got["layers"]["up"]["weight"].validate()
    assert stack.qweight.shape[0] == LAYERS
    for i in range(LAYERS):
        one = jax.tree.map(lambda a, i=i: a[i], stack)
        equal(one, jax_w4a16.quantize(model["layers"]["up"]["weight"][i]))
    assert got["embed"] is model["embed"]
    assert got["layers"]["norm"] is model["layers"]["norm"]
    assert got["layers"]["up"]["bias"] is model["layers"]["up"]["bias"]
    assert got["step"] is model["step"]
    assert isinstance(model["down"][0], jax.Array), "the model is left as it is"


def test_first_match_wins_and_what_none_matches_stays():
    rules = {
        r"^a/0$": Rule(skip=True),
        r"^a/": Rule(group_size=32, symmetric=False),
        r"^b$": Rule(group_size=-1, search="mse"),
    }
    w = normal(K, N)
    got = quantize_model({"a": [w, w], "b": w, "c": w}, rules)
    assert got["a"][0] is w
    assert got["c"] is w
    equal(got["a"][1], jax_w4a16.quantize(w, group_size=32, symmetric=False))
    equal(got["b"], jax_w4a16.quantize(w, group_size=-1, search="mse"))


def test_a_rule_alone_a_scale_type_and_weights_that_are_packed_already():
    first = quantize_model({"a": normal(K, N)}, Rule(group_size=32), scale_dtype=jnp.float16)
    assert first["a"].dtype == jnp.float16
    second = quantize_model({"a": first["a"], "b": np.ones((K, N), np.float32)}, Rule())
    assert second["a"].scales is first["a"].scales
    assert isinstance(second["b"], QuantizedWeight)


@pytest.mark.parametrize("search", ["awq", "fit"])
def test_searches_take_their_inputs_by_path(search):
    model, rule = tree(), Rule(group_size=32, symmetric=False, search=search)
    sample = {"layers/up/weight": normal(LAYERS, T, K, seed=2), "down/0": normal(T, K, seed=3)}
    got = quantize_model(model, {"up/weight|down": rule}, inputs=sample)
    options = {"group_size": 32, "symmetric": False, "search": search}
    equal(got["down"][0], jax_w4a16.quantize(model["down"][0], inputs=sample["down/0"], **options))
    stack = got["layers"]["up"]["weight"].validate()
    for i in range(LAYERS):
        w, x = model["layers"]["up"]["weight"][i], sample["layers/up/weight"][i]
        want = jax_w4a16.quantize(w, inputs=x, **options)
        one = jax.tree.map(lambda a, i=i: a[i], stack)
        close = np.isclose(one.dequantize(jnp.float32), want.dequantize(jnp.float32), rtol=0.02, atol=0.02)
        assert close.mean() > 0.99, "sums may differ in their last bit, and with them a code"


def test_under_eval_shape():
    shapes = jax.eval_shape(lambda m: quantize_model(m, progress=False), tree())
    assert shapes["down"][0].shape == (K, N)
    assert shapes["layers"]["up"]["weight"].qweight.shape == (LAYERS, 2, 2, 128)


WATCHED = (320, 528)  # no other test leaves arrays of this shape behind


class Watch(_progress.Progress):
    """Looks at the memory after each weight."""

    def __init__(self, total):
        super().__init__(total)
        self.seen.append([])

    def step(self, text):
        live = [a for a in jax.live_arrays() if a.dtype == jnp.float32 and a.shape == WATCHED]
        self.seen[-1].append((text, len(live)))
        super().step(text)


def test_one_weight_is_in_flight_at_a_time(monkeypatch):
    """From weights in the host's memory no float copy stays, and each is done before the next begins."""
    Watch.seen = []
    monkeypatch.setattr(_progress, "Progress", Watch)
    begun, one = [], _model._one

    def watched(*arguments):
        assert all(a.is_ready() for packed in begun for a in jax.tree.leaves(packed))
        begun.append(one(*arguments))
        return begun[-1]

    monkeypatch.setattr(_model, "_one", watched)
    draw = lambda *shape: np.random.default_rng(0).standard_normal(shape, np.float32)
    model = {f"w{i}": draw(*WATCHED) for i in range(6)}
    got = quantize_model(model, Rule(search="mse"))
    assert len(got) == len(begun) == 6
    assert Watch.seen == [[(f"w{i}", 0) for i in range(6)]]
    stack = quantize_model({"s": draw(5, *WATCHED)}, Rule(search="mse"))["s"].validate()
    assert len(begun) == 6 + 5
    equal(jax.tree.map(lambda a: a[0], stack), got["w0"])


def test_donated_weights_go_one_by_one(monkeypatch):
    Watch.seen = []
    monkeypatch.setattr(_progress, "Progress", Watch)
    twice = normal(*WATCHED, seed=9)
    model = {f"w{i}": normal(*WATCHED, seed=i) for i in range(4)} | {
        "x": twice,
        "y": twice,
        "bias": normal(8),
    }
    got = quantize_model(model, Rule(), donate=True)
    assert dict(Watch.seen[0]) == {"w0": 4, "w1": 3, "w2": 2, "w3": 1, "x": 1, "y": 1}
    assert all(model[f"w{i}"].is_deleted() for i in range(4))
    assert not twice.is_deleted()
    assert got["bias"] is model["bias"]


def test_rule_is_validated():
    for options, error, match in (
        ({"group_size": 48}, ValueError, "group_size: expected a multiple of 32, or -1, got 48"),
        ({"group_size": 0}, ValueError, "group_size: expected a multiple of 32, or -1, got 0"),
        ({"group_size": 32.0}, TypeError, "group_size: expected an integer, got float"),
        ({"symmetric": 1}, TypeError, "symmetric: expected a bool, got int"),
        ({"skip": "yes"}, TypeError, "skip: expected a bool, got str"),
        ({"search": "best"}, ValueError, "search: expected one of"),
        ({"search": "fit"}, ValueError, "symmetric: expected False for search='fit'"),
    ):
        with pytest.raises(error, match=match):
            Rule(**options)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Rule().skip = True
    assert Rule() == Rule(128, True, False, None)
    assert {Rule(): 1}[Rule()] == 1


LEFT = """
    bias norm1/scales logit_scale in_proj_bias bias_hh_l0 params/dense/biases
    embed_tokens/weight Embed_0/embedding embeddings.word.weight token_embd.weight wte pos_embed h/wpe
    shared.weight norm layers/0/input_layernorm/weight LayerNorm_0 norms/0 q_norm/w BatchNormalization_1
    rms_norm_attention ln_f ln1 h.0.ln_2.weight
    head head/kernel lm_head/kernel model.lm_head.weight policy_head/out classifier score.weight
    logits_dense output output.weight
    router layers/0/router/kernel router_weights mlp.gate.weight moe_router shared_expert_gate
"""
TAKEN = """
    layers/0/mlp/gate_proj gate_up gate_up_proj up_proj q_proj.weight upscale upscale_proj scale_proj
    normal_proj abnormal/w layers/shared/up shared_experts/up shared_expert/down
    attention/output/dense/kernel layers.0.output.weight heads header lnear bias2 aggregate navigate/w
    overhead scored wtemp outputs routers
"""


def packed_by_default(paths):
    got = quantize_model({path: normal(32, 32) for path in paths} | {"a": normal(32, 32)}, DEFAULT_RULES)
    return [path for path in paths if isinstance(got[path], QuantizedWeight)]


def test_default_rules_leave_what_is_no_linear_layer():
    assert packed_by_default(LEFT.split()) == []


def test_default_rules_match_whole_names():
    assert packed_by_default(TAKEN.split()) == TAKEN.split()


def test_float64_is_refused_before_anything_is_packed():
    """NumPy's default type: nothing is lost, not even a donated weight that comes first."""
    model = {"a": normal(K, N), "b": [np.ones((K, N))]}
    with pytest.raises(TypeError, match=r"^b/0: expected float16, bfloat16 or float32, got float64$"):
        quantize_model(model, donate=True)
    assert not model["a"].is_deleted()
    got = quantize_model(model, {"b": Rule(skip=True), "": Rule()})
    assert got["b"][0] is model["b"][0]


def test_refused():
    model = {"a": {"b": normal(K, N)}, "s": normal(LAYERS, K, N)}
    awq = Rule(search="awq")
    for arguments, options, error, match in (
        (
            (model, [Rule()]),
            {},
            TypeError,
            "rules: expected a Rule, or a mapping of patterns to Rules, got list",
        ),
        ((model, {"a": 4}), {}, TypeError, r"rules\['a'\]: expected a Rule, got int"),
        ((model, {"(": Rule()}), {}, ValueError, r"rules\['\('\]: expected a regular expression"),
        (
            (model, {"x": Rule()}),
            {},
            ValueError,
            r"matches a weight, got none; paths of weights: \['a/b', 's'\]",
        ),
        ((model, {"a/b": awq}), {}, ValueError, r"a/b: expected a sample of its inputs, inputs\['a/b'\]"),
        (
            (model, {"a/b": awq}),
            {"inputs": {"a/b": normal(T, K + 1)}},
            ValueError,
            r"a/b: inputs: expected shape \[T, K = 96\], T > 0, got \(24, 97\)",
        ),
        (
            (model, {"s": awq}),
            {"inputs": {"s": normal(T, K)}},
            ValueError,
            r"s: inputs: expected shape \[L = 3, T, K = 96\] for a stack, got \(24, 96\)",
        ),
        ((model, Rule()), {"scale_dtype": int}, TypeError, "a/b: scale_dtype: expected float16"),
    ):
        with pytest.raises(error, match=match):
            quantize_model(*arguments, **options)


def test_paths_that_read_the_same_are_refused():
    ones = jnp.ones((64, 16))
    with pytest.raises(ValueError, match=r"model: expected paths that differ .*\['a/b'\]"):
        quantize_model({"a": {"b": ones}, "a/b": -ones}, Rule(), progress=False)


@pytest.mark.parametrize(
    ("shape", "inputs", "message"),
    [
        ((64, 16), [np.ones((4, 64))], "inputs: expected a mapping of paths to samples, got list"),
        ((2, 64, 16), {"w": [np.ones((4, 64))] * 2}, "w: inputs: expected an array, got list"),
        ((64, 16), {"w": 1.0}, "w: inputs: expected an array, got float"),
    ],
)
def test_malformed_inputs(shape, inputs, message):
    with pytest.raises(TypeError, match=message):
        quantize_model({"w": jnp.ones(shape)}, Rule(search="awq"), inputs=inputs, progress=False)
