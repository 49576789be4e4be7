"""Tables and the roofline plot of gpu.py, from its JSON: needs no GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ERROR = 2e-3  # at most, of a float16 product, relative to its largest result
Values = dict[str, Any]  # one result of a part: its dataclass as JSON


@dataclass(frozen=True)
class Table:
    """The first column has titles, the others have figures."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.headings, [f"---{':' if i else ''}" for i in range(len(self.headings))], *self.rows]
        return f"{self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(found: Values) -> Iterator[Table]:
    """All tables of a run; a part that failed or was stopped has a row in the last one."""
    draw = {
        "ceilings": ceilings,
        "products": products,
        "load": load,
        "streams": streams,
        "graphs": graphs,
        "prefill": prefill,
        "large": large,
        "invariance": invariance,
        "warm_up": warm_up,
    }
    for name, part in found["parts"].items():
        if part["results"]:
            yield from draw[name](part["results"])
    incomplete = [[name, part["problem"]] for name, part in found["parts"].items() if part["problem"]]
    if incomplete:
        yield Table("Parts that are not complete", ["part", "why"], incomplete)


def failures(found: Values) -> list[str]:
    """Parts that are not complete, products with wrong results, and sequences whose bits depend on others."""
    parts = found["parts"]
    wrong = [f"{name}: {part['problem']}" for name, part in parts.items() if part["problem"]]
    for one in parts.get("products", {}).get("results", ()):
        if not one["error"] <= ERROR:
            wrong.append(f"products: wrong results of {one['out']} x {one['in_']}, {one['rows']} rows")
    for one in parts.get("invariance", {}).get("results", ()):
        if one["differ"]:
            wrong.append(f"invariance: other bits {one['how']}: {', '.join(one['differ'])}")
    return wrong


def title(found: Values) -> str:
    return ", ".join(f"{name} {found[name]}".removeprefix("gpu ") for name in ("gpu", "torch", "triton", "squawq"))


def brief(one: Values) -> str:
    """A result in a line."""
    figures = {name: value for name, value in one.items() if not isinstance(value, dict)}
    for inner in (value for value in one.values() if isinstance(value, dict)):
        figures |= {name: value for name, value in inner.items() if not isinstance(value, str)}
    return ", ".join(f"{n} {f'{v:.4g}' if isinstance(v, float) else v}" for n, v in figures.items())


def markdown(found: Values) -> str:
    """For docs/benchmarks.md."""
    return "\n\n".join([f"{title(found)}.", *(table.markdown() for table in tables(found))]) + "\n"


def ceilings(results: Sequence[Values]) -> Iterator[Table]:
    (one,) = results
    rows = [
        ["copy bandwidth, read and written", f"{one['copy_gb_s']:,.0f} GB/s"],
        ["bfloat16 product of 8192 x 8192 x 8192", f"{one['bf16_tflops']:.0f} TFLOP/s"],
        ["float16 product of 8192 x 8192 x 8192", f"{one['fp16_tflops']:.0f} TFLOP/s"],
    ]
    yield Table("Ceilings", ["", "reached"], rows)


def products(results: Sequence[Values]) -> Iterator[Table]:
    """One table a measure: shapes down, numbers of rows across."""
    shapes = dict.fromkeys((one["out"], one["in_"]) for one in results)
    counts = sorted({one["rows"] for one in results})
    known = {(one["out"], one["in_"], one["rows"]): one for one in results}

    def table(name: str, measure: Any) -> Table:
        def cell(shape: tuple[int, int], rows: int) -> str:
            one = known.get((*shape, rows))
            return "" if one is None else measure(one)

        rows = [[f"{out} x {in_}", *(cell((out, in_), count) for count in counts)] for out, in_ in shapes]
        return Table(name, ["out x in", *map(str, counts)], rows)

    def time(value: float | str) -> str:
        return "failed" if isinstance(value, str) else f"{value:.1f}" if value < 100 else f"{value:.0f}"

    yield table("INT4 products, microseconds, by rows", lambda one: time(one["kernel"]))
    yield table("The same with the sum of the parts, microseconds", lambda one: time(one["whole"]))
    yield table("Share of copy bandwidth, by packed bytes", lambda one: f"{one['share']:.2f}")
    yield table("torch's float16 product, microseconds", lambda one: time(one["fp16"]))
    peers = {name: value for one in results for name, value in one["peers"].items()}
    for name in peers:
        if any(isinstance(one["peers"].get(name), float) for one in results):
            yield table(f"{name}, microseconds", lambda one, name=name: time(one["peers"].get(name, "")))
    if missing := [[name, str(value)] for name, value in peers.items() if isinstance(value, str)]:
        yield Table("Peers that were not measured", ["peer", "why"], missing)
    worst = max(results, key=lambda one: one["error"])
    where = f"{worst['out']} x {worst['in_']}, {worst['rows']} rows"
    yield Table("Largest error, relative to the largest result", ["where", "error"], [[where, f"{worst['error']:.1e}"]])


def load(results: Sequence[Values]) -> Iterator[Table]:
    (one,) = results
    rows = [
        ["reading the files", f"{one['read_s']:.1f} s"],
        ["loading them", f"{one['load_s']:.1f} s"],
        ["compiling kernels and capturing CUDA graphs", f"{one['ready_s']:.1f} s"],
        ["peak of host memory", f"{one['host_peak_bytes'] / 2**30:.2f} GiB"],
        ["peak of the card's memory, KV cache of 32,768 tokens included", f"{one['card_peak_bytes'] / 2**30:.2f} GiB"],
    ]
    yield Table("Loading the 8B from the page cache", ["", "found"], rows)


STREAMS = ["streams", "in, out", "first token, s", "decode tok/s", "with prompts", "step, ms", "graph, ms", "rest, ms"]


def stream_row(one: Values) -> list[str]:
    kind = "sampled" if one["sampled"] else "greedy"
    return [
        f"{one['streams']}, {kind}",
        f"{one['prompt']}, {one['new_tokens']}",
        f"{one['first_token_s']:.3f}",
        f"{one['decode_tok_s']:,.0f}",
        f"{one['all_in_tok_s']:,.0f}",
        f"{one['step_ms']:.2f}",
        f"{one['graph_ms']:.2f}",
        f"{one['unhidden_ms']:.2f}",
    ]


def streams(results: Sequence[Values]) -> Iterator[Table]:
    yield Table("8B through the engine", STREAMS, [stream_row(one) for one in results])


def graphs(results: Sequence[Values]) -> Iterator[Table]:
    counts = [str(one["streams"]) for one in results]
    times = [f"{one['graph_ms']:.2f}" for one in results]
    yield Table("CUDA graph of a decode step, 8B, by streams", ["", *counts], [["milliseconds", *times]])


def prefill(results: Sequence[Values]) -> Iterator[Table]:
    (one,) = results
    row = [f"{one['tokens']:,} tokens", f"{one['step_ms']:.1f}", f"{one['matmul_ms']:.1f}", f"{one['share']:.2f}"]
    yield Table("Prefill, 8B", ["", "step, ms", "torch's bfloat16 products, ms", "their share"], [row])


def large(results: Sequence[Values]) -> Iterator[Table]:
    (one,) = results
    name = f"70B through the engine; its weights take {one['weight_bytes'] / 2**30:.1f} GiB"
    yield Table(name, STREAMS, [stream_row(one["stream"])])


def invariance(results: Sequence[Values]) -> Iterator[Table]:
    rows = [[one["how"], f"{one['same']} of {one['sequences']}", ", ".join(one["differ"])] for one in results]
    yield Table("Sequences with the same bits as alone, 8B", ["", "same", "others"], rows)


def warm_up(results: Sequence[Values]) -> Iterator[Table]:
    (one,) = results
    rows = [
        ["loading", f"{one['load_s']:.1f} s"],
        ["first prompt (512 tokens)", f"{one['prompt_s']:.1f} s"],
        ["first decode step", f"{one['decode_s']:.1f} s"],
        ["both", f"{one['prompt_s'] + one['decode_s']:.1f} s"],
        ["then 64 streams (128 in, 4 out)", f"{one['crowd_s']:.1f} s"],
        ["prompt and decode step again", f"{one['again_s']:.3f} s"],
    ]
    yield Table("A fresh process with an empty Triton cache, 8B", ["", "found"], rows)


def plot(found: Values, path: Path) -> None:
    """Roofline (Williams et al., 2009): speed of INT4 products over operations a byte of packed weight and activations.

    Raises ValueError for a run without ceilings or products.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = found["parts"]
    if not all(parts.get(name, {}).get("results") for name in ("ceilings", "products")):
        raise ValueError("the plot needs the parts ceilings and products")
    (top,), results = parts["ceilings"]["results"], parts["products"]["results"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xscale="log", yscale="log")
    edge = top["fp16_tflops"] * 1e3 / top["copy_gb_s"]
    ends = [1.0, edge, 1e4]
    roof = [min(x * top["copy_gb_s"] / 1e3, top["fp16_tflops"]) for x in ends]
    axes.plot(ends, roof, color="black", label="copy bandwidth, float16 product of 8192³")
    for out, in_ in dict.fromkeys((one["out"], one["in_"]) for one in results):
        mine = [one for one in results if (one["out"], one["in_"]) == (out, in_)]
        intensity = [2 * one["rows"] * out * in_ / traffic(out, in_, one["rows"]) for one in mine]
        speed = [2 * one["rows"] * out * in_ / one["kernel"] / 1e6 for one in mine]
        axes.plot(intensity, speed, marker="o", markersize=4, linewidth=1, label=f"{out} x {in_}")
    axes.set(xlabel="operations a byte", ylabel="TFLOP/s", title=f"INT4 products, {found['gpu']}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)


def traffic(out: int, in_: int, rows: int) -> float:
    """Bytes of the packed weight (groups of 128) and of float16 activations and results."""
    return out * in_ / 2 + out * (in_ // 128) * 2.5 + 2 * rows * (in_ + out)
