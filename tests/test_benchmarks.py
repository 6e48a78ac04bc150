"""The arithmetic, the bookkeeping and the programs of the benchmarks; no figure is measured here."""

import ctypes
import importlib.util
import json
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_w4a16

# At the end: the installed package must be found before the repository's folder of that name.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import (
    baselines,
    bench_dot,
    jit,
    native,
    report,
    shapes,
    store,
    sweep_configs,
    timing,
)
from benchmarks.shapes import Cell, Shape
from benchmarks.store import Store

CELL = Cell(256, 128, 4, "bfloat16")


def row(m=1, us=6.0, floor_us=5.0, dense_us=18.0, shape=(4096, 4096), **more):
    n, k = shape
    values = {
        "device": "a card",
        "N": n,
        "K": k,
        "M": m,
        "dtype": "bfloat16",
        "group_size": 128,
        "zeros": False,
        "kernel": "a_kernel",
        **dict.fromkeys(store.COLUMNS),
        "us": us,
        "floor_us": floor_us,
        "dense_us": dense_us,
    }
    return values | more


class TestShapes:
    def test_cells_are_those_of_the_measured_layers(self):
        cells = shapes.cells(shapes.SHAPES, shapes.TOKENS, shapes.DTYPES)
        assert len(cells) == len(set(cells)) == 8 * 14 * 2

    @pytest.mark.parametrize(("n", "k"), [(256, 128), (40, 200)])
    def test_weight_bytes_are_those_of_the_arrays(self, n, k):
        qweight = jax_w4a16.pack(jnp.zeros((k, n), jnp.uint8))
        groups = -(-k // 32)
        assert shapes.weight_bytes(n, k, 32, False) == qweight.nbytes + groups * n * 2
        assert shapes.weight_bytes(n, k, 32, True) == qweight.nbytes + groups * n * 4

    def test_limit(self):
        assert shapes.limit_us(5.0, 1, 4096, 4096) == 5.0
        assert shapes.limit_us(5.0, 8192, 4096, 4096) == pytest.approx(347.9, rel=1e-3)

    def test_parse(self):
        assert shapes.parse_shapes("4096x14336,8x8") == (
            Shape(4096, 14336, "8B down"),
            Shape(8, 8),
        )
        assert shapes.parse_dtypes("fp16,bfloat16") == ("float16", "bfloat16")
        for parse, text in (
            (shapes.parse_shapes, "4096"),
            (shapes.parse_shapes, "axb"),
            (shapes.parse_dtypes, "int4"),
            (shapes.parse_tokens, "1;2"),
        ):
            with pytest.raises(ValueError, match=r"expected|invalid"):
                parse(text)


class TestTiming:
    def test_copies_exceed_the_cache(self):
        for size in (1, 2**20, 2**27, 2**33):
            copies = timing.plan_copies(size)
            assert copies >= 2
            assert copies * size >= timing.COLD_FACTOR * shapes.L2_BYTES

    @pytest.mark.parametrize("call_us", [1.0, 5.0, 60.0, 600.0, 10_000.0, 1e6])
    @pytest.mark.parametrize("copies", [2, 13, 19])
    def test_graphs_are_long_enough_and_affordable(self, call_us, copies):
        calls = timing.plan_calls(call_us, copies)
        assert calls >= 2
        affordable = calls * call_us * timing.MIN_ROUNDS <= timing.CELL_US
        assert affordable or calls == 2
        if call_us <= 60:
            assert calls % copies == 0
            assert calls >= timing.MIN_CALLS
            assert calls * call_us >= timing.GRAPH_US
        rounds = timing.plan_rounds(calls * call_us)
        assert timing.MIN_ROUNDS <= rounds <= timing.MAX_ROUNDS

    def test_chain(self):
        assert timing.plan_chain(5.0) == timing.MAX_CHAIN
        assert timing.plan_chain(1e4) == timing.MIN_CHAIN

    def test_steps_thread_the_carry(self):
        step = jax.jit(lambda x: (x + 1, 2 * x), donate_argnums=0)
        seconds, carry, out = timing.time_steps(step, jnp.float32(0))
        assert seconds > 0
        assert 2 * (carry - 1) == out


class TestStore:
    def test_round_trip(self, tmp_path):
        path = tmp_path / "new" / "results.json"
        results = Store(path, resume=True)
        results.describe({"device": "a card"})
        results.update(CELL, us=1.23456, kernel="a_kernel")
        results.save()
        content = json.loads(path.read_text())
        assert content["header"] == {"device": "a card"}
        (saved,) = content["rows"]
        assert set(saved) == {
            *("device", "N", "K", "M", "dtype", "group_size", "zeros", "kernel"),
            *store.COLUMNS,
        }
        assert (saved["device"], saved["us"], saved["dense_us"]) == ("a card", 1.235, None)

        again = Store(path, resume=True)
        assert not again.missing(CELL, "us")
        assert again.missing(CELL, "dense_us")
        assert Store(path, resume=False).missing(CELL, "us")

    def test_resume_refuses_another_machine(self, tmp_path):
        results = Store(tmp_path / "r.json", resume=True)
        results.describe({"device": "a card", "date": "today"})
        results.describe({"device": "a card", "date": "tomorrow"})
        with pytest.raises(ValueError, match="without --resume"):
            results.describe({"device": "another"})

    def test_tinygemm_exists_only_where_it_can_run(self):
        assert store.applicable("tinygemm_us", CELL)
        assert not store.applicable("tinygemm_us", CELL._replace(dtype="float16"))
        assert not store.applicable("tinygemm_us", CELL._replace(m=512))


class TestReport:
    def test_geomean(self):
        assert report.geomean([1.0, 4.0]) == pytest.approx(2.0)
        assert report.geomean([]) is None

    def test_ratios(self):
        assert report.ratio("us", "limit")(row()) == pytest.approx(1.2)
        assert report.ratio("dense_us", "us")(row()) == pytest.approx(3.0)
        assert report.ratio("dense_us", "us")(row(us=None)) is None
        assert report.ratio("us", "limit")(row(floor_us=None)) is None

    def test_ideal_is_the_ratio_of_bytes_then_one(self):
        assert report.ideal_speedup(row()) == pytest.approx(3.88, abs=0.01)
        assert report.ideal_speedup(row(m=8192)) == 1.0

    def test_summary_judges_each_regime(self, capsys, tmp_path):
        rows = [
            row(m=1, us=5.9),  # 1.18 of the limit
            row(m=2, us=5.0),
            row(m=2, us=6.9, shape=(8192, 8192)),  # 1.38: the mean is met, not the worst
            row(m=16, us=8.0),  # 1.6
            row(m=1024, us=50.0, dense_us=51.0),  # 1.02 of dense
            row(m=2048, us=100.0, dense_us=90.0),
        ]
        rivals = [
            {"N": 4096, "K": 4096, "M": 1, "floor_us": 4.0, "best_us": 4.4, "dense_us": 9.0},
            {"N": 4096, "K": 4096, "M": 1024, "floor_us": 4.0, "best_us": 40.0, "dense_us": 40.0},
        ]
        path = tmp_path / report.RIVALS
        path.write_text(json.dumps({"rows": rivals}))
        report.print_summary({"device": "a card"}, rows, report.Rivals(path))
        lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
        assert " met " in lines["1"]
        assert "MISSED" in lines["2"]
        assert "MISSED" in lines["16"]
        assert " met " in lines["1024"]
        assert "MISSED" in lines["2048"]
        assert " 0 of 1 " in lines["1"]
        assert " 1 of 1 " in lines["1024"]
        assert lines["behind"].endswith("in 1 of 2 cells: 4096x4096 M=1 0.93")

    def test_readme_part_is_replaced_and_the_rest_kept(self):
        header = {"device": "a card", "library": "1.2.3", "date": "2026-01-02T03:04"}
        rows = [row(), row(m=512, us=50.0, dense_us=50.0)]
        part = report.markdown(header, rows, report.Rivals(Path("no such file")), "results")
        assert "| M | time / limit, bfloat16 | faster than dense cuBLAS, bfloat16 |" in part
        assert "| 1 | 1.20 | 3.00 |" in part
        assert "tinygemm" not in part  # it was not measured
        text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
        new = report.replace_part(text, part)
        assert new == f"before\n{report.BEGIN}\n{part}\n{report.END}\nafter\n"
        assert report.replace_part(new, part) == new
        with pytest.raises(ValueError, match="expected the lines"):
            report.replace_part("no markers", part)

    def test_no_mean_over_some_of_the_shapes(self):
        rows = [row(jit_us=8.0, jit_xla_us=16.0), row(shape=(8192, 8192), jit_us=8.0)]
        part = report.markdown(
            {}, [*rows, row(m=2, jit_us=8.0, jit_xla_us=24.0)], report.Rivals(Path("none")), ""
        )
        lines = {line.split(" | ")[0]: line for line in part.splitlines() if line.startswith("| ")}
        assert lines["| 1"].endswith("| - |")
        assert lines["| 2"].endswith("| 3.00 |")

    def test_main_draws_and_rewrites(self, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        results = tmp_path / "results" / "card.json"
        results.parent.mkdir()
        rows = [row(m=m, shape=shape) for m in (1, 64, 512) for shape in ((4096, 4096), (8192, 8192))]
        rows.append(row(m=1024, us=None))
        results.write_text(json.dumps({"header": {"device": "a card"}, "rows": rows}))
        readme = tmp_path / "README.md"
        readme.write_text(f"{report.BEGIN}\n{report.END}\n")
        assert report.main([str(results), "--readme", str(readme)]) == 0
        for plot in (report.SPEEDUP_PLOT, report.LIMIT_PLOT):
            assert "geometric mean" in (results.parent / plot).read_text()
            assert f"(results/{plot})" in readme.read_text()
        readme.write_text("no markers")
        assert report.main([str(results), "--readme", str(readme), "--no-plots"]) == 1
        assert readme.read_text() == "no markers"
        capsys.readouterr()


@pytest.fixture(scope="module")
def library():
    return native.Library(native.find_library())


class TestNative:
    """The C interface as the installed library has it."""

    HOPPER = native.Device(90, 132)

    def problem(self, **changes):
        problem = native.Problem(1, 4096, 4096, 128, 0, 0, 0, 0)
        for name, value in changes.items():
            setattr(problem, name, value)
        return problem

    def test_version_and_status_size(self, library):
        assert library.version == jax_w4a16.__version__
        assert ctypes.sizeof(native.Status) == 512

    @pytest.mark.parametrize("m", [1, 100, 5000])
    def test_selection_agrees_with_the_module(self, library, m):
        chosen = library.select(self.problem(m=m), self.HOPPER)
        assert chosen in library.config_names()
        assert library.refusal(self.problem(m=m), self.HOPPER, chosen) is None
        assert library.workspace_bytes(self.problem(m=m), self.HOPPER, chosen) >= 0

    def test_refusals_carry_the_message(self, library):
        assert "no_such" in (library.refusal(self.problem(), self.HOPPER, "no_such") or "")
        with pytest.raises(native.NativeError, match="group_size"):
            library.select(self.problem(group_size=-7), self.HOPPER)


class TestJit:
    def test_chain_runs_every_call_on_the_last_ones_output(self):
        random = np.random.default_rng(0)
        weights = [(jnp.asarray(random.normal(size=(8, 16)), jnp.float32),) for _ in range(2)]
        x = jnp.asarray(random.normal(size=(3, 8)), jnp.float32)
        got_x, got = jax.jit(jit.chain(baselines.jax_dense, 5))(x, weights)
        expected = jnp.dot(x, *weights[0])
        for i in range(1, 5):
            x = x.at[0, 0].set(expected[0, 0])
            expected = jnp.dot(x, *weights[i % 2])
        np.testing.assert_allclose(got_x, x, rtol=1e-5)
        np.testing.assert_allclose(got, expected, rtol=1e-5)

    def test_chain_keeps_every_call(self):
        weights = jit.Weights(64, 128, 64)
        dot, copies = weights.column("jit_us", "float16")
        x = jax.ShapeDtypeStruct((2, 128), jnp.float16)
        text = jax.jit(jit.chain(dot, 5)).lower(x, copies[:2]).compile().as_text()
        assert text.count('custom_call_target="w4a16_dot"') == 5

    @pytest.mark.parametrize("dtype", shapes.DTYPES)
    @pytest.mark.parametrize("column", store.JIT_COLUMNS)
    def test_columns_compute_the_same_and_the_check_sees_errors(self, column, dtype):
        weights = jit.Weights(64, 256, 128)
        dot, copies = weights.column(column, dtype)
        x = jax.random.normal(jax.random.key(0), (5, 256), dtype)
        out = dot(x, *copies[0])
        assert out.dtype == dtype
        assert weights.check(x, out, dtype) is None
        assert "error" in (weights.check(x, jnp.roll(out, 1, axis=1), dtype) or "")
        assert "error" in (weights.check(x, jnp.full_like(out, jnp.nan), dtype) or "")


class TestGraph:
    @pytest.fixture
    def graph(self, monkeypatch):
        """The module without a GPU: layers are their types, and every column takes its M."""
        torch = types.SimpleNamespace(cuda=types.SimpleNamespace(empty_cache=lambda: None))
        monkeypatch.setitem(sys.modules, "torch", torch)
        spec = importlib.util.find_spec("benchmarks.graph")
        module = importlib.util.module_from_spec(spec)  # known to nobody else
        spec.loader.exec_module(module)
        self.built, self.timed, self.built_by_then = [], [], []

        def layer(library, n, k, dtype, group_size, zeros):
            self.built.append(dtype)
            return dtype

        def graphs(store, layer, cell, device, columns):
            assert layer == cell.dtype
            return dict.fromkeys(columns, cell.m)

        def time_graphs(graphs):
            self.timed.append([(cell.n, cell.m, cell.dtype) for cell, _ in graphs])
            self.built_by_then.append(len(self.built))
            return graphs

        module.warm_up, module.Layer, module._graphs = lambda: None, layer, graphs
        monkeypatch.setattr(timing, "time_graphs", time_graphs)
        return module

    SHAPES = (Shape(256, 128), Shape(512, 128))
    CELLS = shapes.cells(SHAPES, (1, 2, 1024), shapes.DTYPES)
    LIBRARY = types.SimpleNamespace(current_device=lambda: None)

    def test_both_types_are_timed_together_and_large_products_last(self, graph, tmp_path):
        results = Store(tmp_path / "results.json", resume=False)
        graph.measure(results, self.LIBRARY, self.CELLS, ["us"], lambda: False)
        order = [(256, 1), (256, 2), (512, 1), (512, 2), (256, 1024), (512, 1024)]
        assert self.timed == [[(n, m, dtype) for dtype in shapes.DTYPES] for n, m in order]
        assert self.built == [*shapes.DTYPES] * 4  # of two shapes, twice
        assert self.built_by_then == [2, 2, 4, 4, 6, 8]  # a graph's weights are there when it is timed
        assert [row["us"] for row in results.rows()] == [1, 1, 2, 2, 1, 1, 2, 2, 1024, 1024, 1024, 1024]

    def test_no_weights_are_made_for_what_there_is_no_time_for(self, graph, tmp_path):
        results = Store(tmp_path / "results.json", resume=False)
        graph.measure(results, self.LIBRARY, self.CELLS, ["us"], lambda: len(self.timed) == 1)
        assert len(self.timed) == 1
        assert self.built == [*shapes.DTYPES]

    def test_what_is_measured_is_not_measured_again(self, graph, tmp_path):
        results = Store(tmp_path / "results.json", resume=False)
        for cell in self.CELLS[1:]:
            results.update(cell, us=1.0)
        graph.measure(results, self.LIBRARY, self.CELLS, ["us"], lambda: False)
        assert self.timed == [[(256, 1, shapes.DTYPES[0])]]


class TestSweep:
    def test_hopeless(self):
        assert not sweep_configs.hopeless(20.0, 10.0)
        assert sweep_configs.hopeless(1000.0, 100.0)

    def test_loss(self):
        times = {"us": {"a": 2.0, "b": 3.0}, "slow_us": {"c": 20.0}, "best": "a"}
        assert sweep_configs.loss({**times, "selected": "b"}) == pytest.approx(1.5)
        assert sweep_configs.loss({**times, "selected": "c"}) == pytest.approx(10.0)
        assert sweep_configs.loss({**times, "selected": "refused"}) is None


def test_command_line():
    options = bench_dot.arguments(["--smoke", "--m", "1,2", "--dtype", "bf16"])
    assert bench_dot.cells(options) == [
        Cell(s.n, s.k, m, "bfloat16") for s in shapes.SMOKE_SHAPES for m in (1, 2)
    ]
    assert options.columns == store.COLUMNS
    with pytest.raises(SystemExit):
        bench_dot.arguments(["--columns", "us,made_up"])
