"""`llmc bench`: how fast an artifact runs here, and how that compares with what the machine can read."""

from __future__ import annotations

import resource
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from llmc.bench.bandwidth import ReadProbe, cores
from llmc.bench.engines import Llmc


@dataclass(frozen=True)
class Figures:
    """Medians over the repeats. Bandwidths in bytes a second; a decode step reads every weight once."""

    artifact: str
    target: str
    cores: int
    prompt: int
    context: int
    batch: int
    load_seconds: float
    prefill_tokens_per_second: float
    first_token_seconds: float
    decode_tokens_per_second: float
    decode_bytes_per_second: float
    read_bytes_per_second: float
    weights_bytes: int
    peak_bytes: int

    @property
    def share_of_bandwidth(self) -> float:
        return self.decode_bytes_per_second / self.read_bytes_per_second

    def to_dict(self) -> dict:
        return {**asdict(self), "share_of_bandwidth": self.share_of_bandwidth}

    def __str__(self) -> str:
        decode, read = self.decode_bytes_per_second / 1e9, self.read_bytes_per_second / 1e9
        return "\n".join(
            [
                f"{self.artifact}: {self.target} on {self.cores} cores, loaded in {self.load_seconds:.2f} s",
                f"prefill   {self.prefill_tokens_per_second:.1f} tokens/s over {self.prompt} tokens, "
                f"first token after {1e3 * self.first_token_seconds:.0f} ms",
                f"decode    {self.decode_tokens_per_second:.1f} tokens/s at context {self.context}, batch {self.batch}",
                f"bandwidth {decode:.1f} GB/s of weights, {100 * decode / read:.0f}% of the {read:.1f} GB/s read here",
                f"memory    {self.peak_bytes / 1e6:.0f} MB at the peak; weights {self.weights_bytes / 1e6:.0f} MB",
            ]
        )


def measure(
    artifact: Path, *, target: str | None, context: int, prompt: int, decode: int, batch: int, repeats: int
) -> Figures:
    """Measure an artifact; the reads that tell the bandwidth alternate with the decoding. Raises ArtifactError."""
    started = time.perf_counter()
    engine = Llmc(str(artifact), target)
    loaded = time.perf_counter() - started
    info = engine.model.info
    longest = engine.model.max_context
    context, prompt = min(context, longest - decode - 2 * batch), min(prompt, longest - 1)
    probe = ReadProbe()
    engine.prefill(prompt)
    prefills, steps, reads = [], [], []
    for _ in range(repeats):
        reads.append(probe.median(1))
        prefills.append(engine.prefill(prompt))
        steps.append(engine.decode(context, batch, decode))
    first, step = statistics.median(prefills), statistics.median(steps)
    weights = info.memory["weights_bytes"]
    return Figures(
        artifact=info.name,
        target=engine.model.target,
        cores=cores(),
        prompt=prompt,
        context=context,
        batch=batch,
        load_seconds=loaded,
        prefill_tokens_per_second=prompt / first,
        first_token_seconds=first,
        decode_tokens_per_second=batch / step,
        decode_bytes_per_second=weights / step,
        read_bytes_per_second=statistics.median(reads),
        weights_bytes=weights,
        peak_bytes=(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - probe.nbytes,
    )
