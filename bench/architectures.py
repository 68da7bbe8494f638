"""Every causal-LM type of transformers, compiled from its published layout and compared with transformers.

    python -m llmc.bench.architectures [NAME ...] [--jobs 2] [--only refused] [--resume] [--mutate] [--json]

For each type (and the variants of `configs`) a small random model is saved as such models are published
(`checkpoints`), compiled from that folder for the CPU, and asked for the logits of a ragged batch (lengths 1, 2, 17,
31, 64, 100), of prefills cut into chunks, and of decoding step by step. The verdict:

    pass      every error is at most 1e-4 of the logits' spread (their root mean square about the mean of their row)
    refused   the compiler said that it can't, and why
    wrong     some error is larger, or a number is not finite
    error     it crashed, ran out of time, or gave no result

Each type runs in a child process, one thread each. The results go to bench/results/, as a table and as JSON.
Exit code 1 when any type is wrong or ended in an error.
"""

import argparse
import concurrent.futures
import datetime
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from . import configs

RESULTS = Path(__file__).parent / "results"
VERDICTS = ("pass", "refused", "wrong", "error")


def parser():
    parse = argparse.ArgumentParser(prog="python -m llmc.bench.architectures", description=__doc__.split("\n\n")[0])
    parse.add_argument("names", nargs="*", metavar="NAME", help="types or variants; default: all")
    parse.add_argument("--jobs", type=int, default=1, help="how many at a time (default 1)")
    parse.add_argument("--timeout", type=float, default=600, help="seconds for one type (default 600)")
    parse.add_argument("--only", metavar="VERDICT[,…]", help="those which ended so the last time")
    parse.add_argument("--resume", action="store_true", help="keep the last results, run what has none")
    parse.add_argument("--mutate", action="store_true", help="plant faults in each type: every one must come out wrong")
    parse.add_argument("--json", action="store_true", help="print the results as JSON")
    parse.add_argument(
        "--work", type=Path, help="folder of models and results (default: llmc-architectures, temporary)"
    )
    parse.add_argument("--no-table", action="store_true", help="write nothing to bench/results")
    return parse


def main(argv=None):
    options = parser().parse_args(argv)
    work = options.work or Path(tempfile.gettempdir()) / "llmc-architectures"
    known = configs.names()
    if unknown := [name for name in options.names if name not in known]:
        print(
            f"unknown type {', '.join(unknown)}: transformers has {len(known)}, see bench/configs.py", file=sys.stderr
        )
        return 2
    kind = "mutations" if options.mutate else "results"
    (work / kind).mkdir(parents=True, exist_ok=True)
    last = {name: json.loads(path.read_text()) for name in known if (path := result_path(work, kind, name)).exists()}
    names = options.names or known
    if options.only:
        wanted = options.only.split(",")
        names = [name for name in names if last.get(name, {}).get("verdict") in wanted]
    elif options.resume:
        names = [name for name in names if name not in last]
    fresh = sweep(names, work, kind, options)
    everything = last | fresh if options.only or options.resume else fresh
    results = [everything[name] for name in known if name in everything]
    if not options.no_table:
        write_table(results, kind)
    print(json.dumps(results, indent=1) if options.json else summary(results))
    return 1 if any(result["verdict"] in ("wrong", "error") for result in results) else 0


def result_path(work, kind, name):
    return work / kind / f"{name}.json"


def sweep(names, work, kind, options):
    """Run every name in a child process; {name: result}."""
    for variable in ("OMP_NUM_THREADS", "TVM_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"  # read by the server of child processes
    results = {}
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        pending = {pool.submit(run_child, name, work, kind, options): name for name in names}
        for done in concurrent.futures.as_completed(pending):
            result = results[pending[done]] = done.result()
            print(f"[{len(results)}/{len(names)}] {line(result)}", file=sys.stderr, flush=True)
    return results


def run_child(name, work, kind, options):
    """The result of one type, whatever its process comes to."""
    if name in configs.UNBUILT:
        return {"name": name, "verdict": "refused", "reason": f"not built: {configs.UNBUILT[name]}", "seconds": 0.0}
    path = result_path(work, kind, name)
    path.unlink(missing_ok=True)
    log = work / "log.txt" if options.jobs == 1 else work / f"log-{name}.txt"
    start = time.monotonic()
    code = run_process(child, (name, work, options.mutate, log), options.timeout)
    if path.exists():
        result = json.loads(path.read_text())
    elif code is None:
        result = {"name": name, "verdict": "error", "reason": f"no result after {options.timeout:.0f} s"}
    else:
        words = log.read_text(errors="replace").strip()[-600:] if log.exists() else ""
        result = {"name": name, "verdict": "error", "reason": f"ended with exit code {code}: {words}"}
    result["seconds"] = round(time.monotonic() - start, 1)
    path.write_text(json.dumps(result))
    return result


def run_process(target, args, timeout):
    """The exit code of target(*args) in a process of its own; None if it had to be ended after `timeout` seconds.

    Processes are forked from a server that has imported what they need, once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llmc.bench.comparison", "llmc.bench.mutations", "llmc.compiler"])
    process = context.Process(target=target, args=args)
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return process.exitcode


def child(name, work, mutate, log):
    """The body of a child process: judge one type, its output and errors in `log`."""
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    from . import comparison

    comparison.child(name, work, mutate)


def line(result):
    errors = " ".join(f"{kind} {shown(error)}" for kind, error in result.get("errors", {}).items())
    return f"{result['verdict']:8s}{result['name']:28s}{errors} {shortened(result.get('reason', ''))}".rstrip()


def shown(error):
    """An error in the logits' spread; None stands for a number that is not finite, or a wrong shape."""
    return "not finite" if error is None else f"{error:.1e}"


def shortened(text, length=300):
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def summary(results):
    counts = Counter(result["verdict"] for result in results)
    lines = [", ".join(f"{verdict}: {counts[verdict]}" for verdict in VERDICTS)]
    lines += [line(result) for result in results if result["verdict"] in ("wrong", "error")]
    return "\n".join(lines)


def markdown(results, kind, today):
    """The table of a sweep: counts, then a row for each type."""
    types = [result for result in results if result["name"] not in configs.VARIANTS]
    variants = [result for result in results if result["name"] in configs.VARIANTS]
    text = [f"# Architectures, {kind}: {today}", "", "Written by `python -m llmc.bench.architectures`.", ""]
    for title, rows in (("Types", types), ("Variants", variants)):
        counts = Counter(row["verdict"] for row in rows)
        text += [f"{title}: " + ", ".join(f"{verdict} {counts[verdict]}" for verdict in VERDICTS) + ".", ""]
    columns = list(dict.fromkeys(key for row in results for key in row.get("errors", {})))
    text += [
        "Errors are the largest over all logits, in the logits' spread; a pass is at most 1e-4 of it.",
        "",
        f"| type | verdict |{''.join(f' {column} |' for column in columns)} what | s |",
        f"|---|---|{'---|' * len(columns)}---|---|",
    ]
    if kind == "mutations":
        text[-4] = (
            "Errors with a fault planted, in the logits' spread; a pass is a type all of whose faults exceed 1e-4."
        )
    for row in results:
        errors = row.get("errors", {})
        cells = "".join(f" {shown(errors[column]) if column in errors else ''} |" for column in columns)
        what = shortened(row.get("reason", "")).replace("|", "\\|")
        text.append(f"| {row['name']} | {row['verdict']} |{cells} {what} | {row['seconds']:.0f} |")
    return "\n".join(text) + "\n"


def write_table(results, kind):
    today = datetime.date.today().isoformat()
    stem = "architectures" if kind == "results" else f"architectures-{kind}"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{stem}-{today}.md").write_text(markdown(results, kind, today))
    (RESULTS / f"{stem}-{today}.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
