"""The command line. Results go to stdout, progress and logs to stderr.

Exit codes: 0 done; 2 wrong usage or input; 1 anything else.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import llmc
from llmc.inspection import calibration_lines, quality_lines

app = typer.Typer(
    name="llmc",
    help="Compile transformer language models ahead of time, and run what came out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "llmc compile Qwen3-0.6B/model.safetensors\n\n"
    "llmc compile Qwen/Qwen3-0.6B --target cpu -o qwen.llmc --max-context 8192\n\n"
    "llmc compile llama/ --target cuda:sm_90,rocm:gfx942,metal --host linux-x86_64\n\n"
    "llmc compile llama/ --quantize int4\n\n"
    "llmc compile llama/ --verify --dump passes/"
)
def compile(
    source: Annotated[
        str, typer.Argument(help="A Hugging Face folder, a .safetensors in it or its index, or a hub id.")
    ],
    target: Annotated[
        str, typer.Option(help="Targets, joined by commas: cpu, cuda, cuda:sm_90, rocm:gfx942, metal, …")
    ] = "cpu",
    host: Annotated[
        str | None, typer.Option(help="Machine beside the GPU: linux-x86_64, linux-aarch64, macos-arm64.")
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            help="A scheme (llmc.schemes() lists them): int4, int8, int4-g64:head=int8, …; head= is for embedding and "
            "output head, by default int8 where the scheme has fewer than 8 bits, head=none leaves them."
        ),
    ] = None,
    kv_cache: Annotated[
        str | None, typer.Option(help="Cache dtype: int8 or fp8; default: the activations' dtype.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder to write; default: NAME.llmc here.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing artifact.")] = False,
    max_context: Annotated[
        int | None, typer.Option(help="Longest sequence to serve; default: the model's own.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Compute dtype of activations: float32, bfloat16, float16.")] = None,
    weights: Annotated[str, typer.Option(help="'load', or 'random': seeded, made at load, never stored.")] = "load",
    calibrate: Annotated[
        Path | None,
        typer.Option(help="A text: weights are scaled (AWQ) and rounded (GPTQ) by what products read of it."),
    ] = None,
    quality: Annotated[
        str | None,
        typer.Option(help="A text on which the quantized model is measured; default: a bundled page; 'none': not."),
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="Evaluate the program after every pass against the imported one.")
    ] = False,
    dump: Annotated[Path | None, typer.Option(help="Write a diff of every pass into this folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a report as JSON.")] = False,
) -> None:
    """Compile a model into an artifact."""
    path = llmc.compile(
        source,
        target,
        quantize=quantize,
        kv_cache=kv_cache,
        output=output,
        overwrite=overwrite,
        max_context=max_context,
        dtype=dtype,
        host=host,
        weights=weights,
        calibrate=calibrate,
        quality=quality,
        verify=verify,
        dump=dump,
        progress=True if sys.stderr.isatty() else None,
    )
    report = llmc.inspect(path)
    if as_json:
        print_json({"path": str(path), **report.to_dict()})
    else:
        model = report.to_dict()["model"]
        for line in calibration_lines(model.get("calibration")) + quality_lines(model.get("quality")):
            print(line, file=sys.stderr)
        for note in report.notes:
            print(f"note: {note}", file=sys.stderr)
        print(path)


@app.command(
    epilog="[bold]Examples[/]\n\n"
    'llmc run model.llmc "Once upon a time" --max-tokens 64\n\n'
    "llmc run model.llmc --chat\n\n"
    "cat prompt.txt | llmc run model.llmc --temperature 0.7 --seed 1"
)
def run(
    artifact: Annotated[Path, typer.Argument(help="An artifact that llmc compile wrote.")],
    prompt: Annotated[str | None, typer.Argument(help="Default: standard input, or a chat on a terminal.")] = None,
    target: Annotated[
        str | None, typer.Option(help="One of the artifact's targets; default: the best one here.")
    ] = None,
    cache_tokens: Annotated[int | None, typer.Option(help="Size of the page pool in tokens.")] = None,
    chat: Annotated[bool, typer.Option(help="Put the prompt through the model's chat template.")] = False,
    stats: Annotated[bool, typer.Option(help="Print token counts and speeds to stderr.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    min_tokens: Annotated[int, typer.Option(help="No stop before this many tokens.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the smallest set of tokens with this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the likeliest one.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages tokens seen before.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Subtracted once from generated tokens.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="Subtracted for each time a token was generated.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this text; may be given several times.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Go on past the end-of-sequence token.")] = False,
) -> None:
    """Generate text from an artifact, streaming it to stdout."""
    from llmc.console import chat_session, complete

    sampling = dict(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=stop or None,
        ignore_eos=ignore_eos,
    )
    with llmc.load(artifact, target=target, cache_tokens=cache_tokens) as model:
        if prompt is None and sys.stdin.isatty():
            chat_session(model, sampling, stats=stats)
            return
        text = sys.stdin.read() if prompt is None else prompt
        complete(model, [{"role": "user", "content": text}] if chat else text, sampling, stats=stats)


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "llmc inspect model.llmc --kernels\n\n"
    "llmc inspect model.llmc --check\n\n"
    "llmc inspect Qwen3-0.6B/ --after page_attention"
)
def inspect(
    source: Annotated[str, typer.Argument(help="An artifact, or a model to look at after a pass.")],
    after: Annotated[str | None, typer.Option(help="Print the program as it is after this pass.")] = None,
    kernels: Annotated[bool, typer.Option(help="List the kernels.")] = False,
    check: Annotated[bool, typer.Option(help="Read and hash every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show what is in an artifact, or a model's program after any pass."""
    report = llmc.inspect(source, after=after, check=check)
    if as_json:
        print_json(report.to_dict())
    else:
        print(report.render(kernels=kernels))


@app.command(epilog="[bold]Example[/]\n\nllmc verify model.llmc --target cuda:sm_90")
def verify(
    artifact: Annotated[Path, typer.Argument(help="An artifact that llmc compile wrote.")],
    target: Annotated[str, typer.Option(help="One of the artifact's targets.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Run an artifact's kernels on the software device and compare them with the reference."""
    report = llmc.verify(artifact, target)
    if as_json:
        print_json(report.to_dict())
    else:
        print(report)
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def targets(as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False) -> None:
    """List what can be compiled for, what this machine can run, and which toolchains were found."""
    report = llmc.targets()  # type: ignore[operator]  # a room that can be called
    if as_json:
        print_json([entry._asdict() for entry in report])
        return
    width = max(len(entry.name) for entry in report)
    for entry in report:
        print(f"{entry.name:{width}}  {entry.status:9}  {entry.about}")


@app.command(epilog="[bold]Example[/]\n\nllmc bench model.llmc --batch 8 --context 2048")
def bench(
    artifact: Annotated[Path, typer.Argument(help="An artifact that llmc compile wrote.")],
    target: Annotated[
        str | None, typer.Option(help="One of the artifact's targets; default: the best one here.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens in the cache before decoding.")] = 128,
    prompt: Annotated[int, typer.Option(help="Tokens of the prefill that is timed.")] = 512,
    decode: Annotated[int, typer.Option(help="Tokens decoded in a repeat.")] = 16,
    batch: Annotated[int, typer.Option(help="Sequences decoded together.")] = 1,
    repeats: Annotated[int, typer.Option(help="Repeats; medians are printed.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure prefill and decode speed, time to the first token, share of this machine's bandwidth, and memory."""
    from llmc.bench.artifact import measure

    figures = measure(
        artifact, target=target, context=context, prompt=prompt, decode=decode, batch=batch, repeats=repeats
    )
    if as_json:
        print_json(figures.to_dict())
    else:
        print(figures)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `llmc` script: an expected failure is one line on stderr and exit code 2."""
    from llmc.ir.errors import CompileError
    from llmc.runtime.errors import ArtifactError, RequestError

    try:
        app(arguments)
    except (CompileError, ArtifactError, RequestError) as error:
        stop(str(error), code=2)
    except KeyboardInterrupt:
        stop("interrupted; the same command goes on where this one stopped", code=2)
    except Exception as error:
        stop(f"internal error: {type(error).__name__}: {error} (LLMC_DEBUG=1 shows the traceback)", code=1)
    finally:
        gc.freeze()  # else the interpreter looks through every object of torch and TVM once more at its end: a second


def stop(message: str, *, code: int) -> None:
    """End the process with one line on stderr; LLMC_DEBUG shows the traceback instead."""
    if os.environ.get("LLMC_DEBUG"):
        raise
    print("llmc: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(code) from None


if __name__ == "__main__":
    main()
