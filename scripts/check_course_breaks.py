"""Does a notebook notice when the engine is wrong? One constant changed at a time, its notebook must fail.

    python scripts/check_course_breaks.py [INF-10 ...]

A break is a replacement in one module's source, done in the kernel before the notebook's first cell; no file
is touched. Results: docs/results/course_breaks.json, what each notebook said.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from ridgeline.bench.environment import environment
from ridgeline.course.catalog import notebook
from ridgeline.course.runner import run_notebook

OUT = Path(__file__).parents[1] / "docs/results/course_breaks.json"


@dataclass(frozen=True, slots=True)
class Break:
    """In `module`, `old` becomes `new`; the notebook `code` teaches what that spoils."""

    code: str
    what: str
    module: str
    old: str
    new: str

    def cell(self) -> str:
        """What the kernel runs first: the module again, from its changed source."""
        return (
            "import importlib, inspect\n"
            f"broken = importlib.import_module({self.module!r})\n"
            "source = inspect.getsource(broken)\n"
            f"assert source.count({self.old!r}) == 1, 'the source has changed; mend this break'\n"
            f"source = source.replace({self.old!r}, {self.new!r})\n"
            "exec(compile(source, broken.__file__, 'exec'), vars(broken))\n"
        )


SCALES = (
    "ridgeline.compress.grids",
    "        scales.float().cpu().numpy(),",
    "        1.02 * scales.float().cpu().numpy(),",
)
BREAKS = (
    Break(
        "INF-00",
        "weights are counted twice",
        "ridgeline.ops.program",
        "return sum(weight.num_bytes for weight in self.weights)",
        "return 2 * sum(weight.num_bytes for weight in self.weights)",
    ),
    Break(
        "INF-01",
        "layers that look alike are counted once",
        "ridgeline.profiling.breakdown",
        "for i, value in enumerate((1, (end_ns - begin_ns) / 1e9, *counted[alike])):",
        "for i, value in enumerate((1, (end_ns - begin_ns) / 1e9, *counted.get(number, (0, 0)))):",
    ),
    Break(
        "INF-02",
        "a multiply-add counts as one operation",
        "ridgeline.ops.program",
        "return 2 * self.num_rows(instruction.read_buffers[0], shape) * num_elements",
        "return self.num_rows(instruction.read_buffers[0], shape) * num_elements",
    ),
    Break(
        "INF-03",
        "percentiles are those of the other end",
        "ridgeline.bench.intervals",
        "return float(np.percentile(np.asarray(samples, np.float64), q))",
        "return float(np.percentile(np.asarray(samples, np.float64), 100 - q))",
    ),
    Break(
        "INF-10",
        "the KV cache always misses",
        "ridgeline.engine.scheduler",
        "            if not self._kv_cache:\n",
        "            if True:\n",
    ),
    Break(
        "INF-11",
        "bfloat16 cuts instead of rounding",
        "ridgeline.quant.gguf_blocks",
        "(np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))",
        "np.uint32(0)",
    ),
    Break(
        "INF-12",
        "a static batch is not padded",
        "ridgeline.engine.scheduler",
        "num_padding=longest - wanted",
        "num_padding=0",
    ),
    Break(
        "INF-13",
        "the number of tokens is a constant of the graph",
        "ridgeline.engine.executors.compiled",
        "torch._dynamo.mark_dynamic(tensor, 0)",
        "pass",
    ),
    Break("INF-14", "scales of the quantizer are 2 % off", *SCALES),
    Break(
        "INF-20",
        "the online softmax does not scale down what it has summed",
        "ridgeline.ops.flash",
        "summed = summed * decay + weights",
        "summed = summed + weights",
    ),
    Break(
        "INF-21",
        "KV heads are repeated in the wrong order",
        "ridgeline.models.surgery",
        "np.repeat(_by_head(rows, current), wanted // current, axis=0)",
        "np.concatenate([_by_head(rows, current)] * (wanted // current))",
    ),
    Break(
        "INF-23",
        "YaRN stretches fast dimensions too",
        "ridgeline.models.rope",
        "scaled = inv_freq / rope.factor * ramp + inv_freq * (1 - ramp)",
        "scaled = inv_freq / rope.factor",
    ),
    Break("INF-24", "scales of the quantizer are 2 % off", *SCALES),
    Break(
        "INF-30",
        "batches are static whatever is asked for",
        "ridgeline.engine.scheduler",
        'self._static = config.batching == "static"',
        "self._static = True",
    ),
    Break(
        "INF-31",
        "every request gets a block too many",
        "ridgeline.kvcache.manager",
        "return -(-num_tokens // self.block_size)",
        "return -(-num_tokens // self.block_size) + 1",
    ),
    Break(
        "INF-33",
        "published blocks are never found",
        "ridgeline.kvcache.manager",
        "                if found is None:\n                    break\n                matched",
        "                break\n                matched",
    ),
    Break(
        "INF-34",
        "bytes of the collectives are counted twice",
        "ridgeline.ops.program",
        "return element_size * self.num_rows(buffer, shape)",
        "return 2 * element_size * self.num_rows(buffer, shape)",
    ),
    Break("INF-41", "scales of the quantizer are 2 % off", *SCALES),
    Break(
        "INF-43",
        "Q4_0 counts from -7",
        "ridgeline.quant.gguf_blocks",
        'return _column(b, "d") * (_unpack(b["qs"], bits=4, run=16).astype(np.float32) - np.float32(8))',
        'return _column(b, "d") * (_unpack(b["qs"], bits=4, run=16).astype(np.float32) - np.float32(7))',
    ),
    Break("INF-42", "scales of the quantizer are 2 % off", *SCALES),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("codes", nargs="*", help="only these notebooks; all if left out")
    args = parser.parse_args()
    wanted = {notebook(code).code for code in args.codes}
    kept = json.loads(OUT.read_text())["breaks"] if OUT.exists() and wanted else {}
    for one in BREAKS:
        if wanted and one.code not in wanted:
            continue
        ran = run_notebook(one.code, before=one.cell())
        text = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(ran.problems))
        said = [line for line in text.splitlines() if line.strip()]
        kept[f"{one.code}: {one.what}"] = {
            **asdict(one),
            "failed": bool(said),
            "seconds": round(ran.seconds, 1),
            "said": said[-1] if said else "nothing",
        }
        print(
            f"{one.code} {one.what}: {'fails' if said else 'PASSES'}: {(said or ['nothing'])[-1]}", flush=True
        )
        date = time.strftime("%Y-%m-%d")
        OUT.write_text(
            json.dumps({"date": date, "environment": environment(), "breaks": kept}, indent=1) + "\n"
        )
    if not all(found["failed"] for found in kept.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
