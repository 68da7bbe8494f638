"""One type of the sweep: save it, compile it, run it in every way, and judge. Runs in a child process of its own."""

import json
import shutil
import time
from pathlib import Path

import numpy as np

from llmc.runtime import artifact
from llmc.runtime.devices.cpu import CpuExecutor
from llmc.runtime.executor import Table, aligned

from . import checkpoints, configs

TOLERANCE = 1e-4  # of the logits' spread: float32 rounding reaches 1e-5 of it, the mildest of planted faults 1e-3
CUTS = (7, 16, 1, 33, 5)


def error(got, want, unit):
    """The largest error over all logits, in `unit`; None where a number is not finite, or a shape is another."""
    if [rows.shape for rows in got] != [rows.shape for rows in want]:
        return None
    if not all(np.isfinite(rows).all() for rows in got):
        return None
    return max(float(np.abs(a - b).max()) for a, b in zip(got, want, strict=True)) / unit


def verdict(errors, tolerance=TOLERANCE):
    """ "pass" if every error is a number within the tolerance, else "wrong"."""
    return "pass" if all(found is not None and found <= tolerance for found in errors.values()) else "wrong"


class Sequences:
    """Sequences in the paged cache of an executor, served as its caller says: the scheduler of the runtime left out.

    Pages are handed out in a shuffled order, given back as soon as a window or a chunk has passed them, and reused.
    """

    def __init__(self, executor, seed=0):
        self.executor = executor
        self.lengths: dict[int, int] = {}
        self.tables: list[dict[int, list[int]]] = [{} for _ in executor.groups]
        shuffle = np.random.default_rng(seed).permutation
        self.free = [[int(page) for page in shuffle(np.arange(1, pages))] for pages in executor.pages]

    def step(self, new):
        """new: {sequence: its next tokens} -> [logits [n_i, vocab] of all of them], in that order."""
        starts = {key: self.lengths.get(key, 0) for key in new}
        rows = sum(map(len, new.values()))
        tables = [self._table(group, new, starts) for group in range(len(self.tables))]
        positions = np.concatenate([np.arange(start, start + len(new[key])) for key, start in starts.items()])
        for key, tokens in new.items():
            self.lengths[key] = starts[key] + len(tokens)
        splits = np.cumsum([0, *map(len, new.values())])
        hidden = self.executor.embed(_i32(np.concatenate(list(new.values()))))
        logits = self.executor.step(hidden, _i32(positions)[None], _i32(splits), _i32(range(rows)), tables)
        return [part.copy() for part in np.split(np.asarray(self.executor.fetch(logits)), splits[1:-1])]

    def _table(self, group, new, starts):
        facts, free = self.executor.groups[group], self.free[group]
        indptr, indices, last = [0], [], []
        for key, tokens in new.items():
            pages = self.tables[group].setdefault(key, [])
            for passed in range(first_visible(starts[key], facts.window, facts.chunk) // facts.page_size):
                if pages[passed]:
                    free.insert(0, pages[passed])
                    pages[passed] = 0
            length = starts[key] + len(tokens)
            while len(pages) * facts.page_size < length:
                pages.append(free.pop())
            indices += pages
            indptr.append(len(indices))
            last.append(length - (len(pages) - 1) * facts.page_size)
        return Table(_i32(indptr), _i32(indices), _i32(last))


def first_visible(position, window, chunk):
    """The first position that a token at `position` attends to."""
    if window:
        return max(position - window + 1, 0)
    if chunk:
        return position // chunk * chunk
    return 0


def _i32(values):
    array = np.asarray(list(values), np.int32)
    out = aligned(array.size)
    out[:] = array
    return out


def chunked(sequences, ids):
    """Prefill cut into chunks of changing lengths, all sequences side by side -> logits of each."""
    return in_steps(sequences, ids, lambda turn, i: CUTS[(turn + i) % len(CUTS)])


def decoded(sequences, ids):
    """The first half of each sequence in one step, then a token a step, teacher-forced -> logits of each."""
    halves = [len(tokens) // 2 for tokens in ids]
    return in_steps(sequences, ids, lambda turn, i: halves[i] if turn == 0 else 1)


def in_steps(sequences, ids, size):
    """Feed size(turn, i) tokens of sequence i in each turn, until all are served -> logits of each."""
    got: list[list[np.ndarray]] = [[] for _ in ids]
    done, turn = [0] * len(ids), 0
    while any(at < len(tokens) for at, tokens in zip(done, ids, strict=True)):
        parts = {i: tokens[done[i] : done[i] + size(turn, i)].tolist() for i, tokens in enumerate(ids)}
        new = {i: part for i, part in parts.items() if part}
        for i, logits in zip(new, sequences.step(new), strict=True):
            got[i].append(logits)
            done[i] += len(new[i])
        turn += 1
    return [np.concatenate(parts) for parts in got]


def executor_of(path, tokens=1024):
    """The executor of an artifact's first target, with room for `tokens` in every group."""
    manifest = artifact.read(path)
    target = manifest.targets[0]
    return CpuExecutor(Path(path), manifest, target, [tokens // group.page_size + 1 for group in target.state])


def compare(path, folder, measure=error):
    """Run an artifact in every way and compare: {"verdict", "errors", "bitwise"}.

    measure: what is an error of logits found, logits wanted, and their spread.
    """
    import llmc

    facts, ids, want = checkpoints.read(folder)
    with llmc.load(path) as model:
        ragged = model.logits([sequence.tolist() for sequence in ids])
    ways = {"ragged": ragged}
    for name, way in (("chunked", chunked), ("decode", decoded)):
        executor = executor_of(path)
        ways[name] = way(Sequences(executor), ids)
        executor.close()
    errors = {name: measure(got, want, facts["spread"]) for name, got in ways.items()}
    same = all(np.array_equal(a, b) for got in ways.values() for a, b in zip(got, ragged, strict=True))
    differs = {} if same else {"reason": "the numbers pass, but their bits depend on how sequences are cut or batched"}
    return {"verdict": verdict(errors), "errors": errors, "bitwise": same, **differs}


def model_folder(name, work):
    """The folder of a type's model, written if it is not there or is that of another config."""
    folder = work / "models" / name
    facts = folder / "facts.json"
    if not (facts.exists() and json.loads(facts.read_text()).get("key") == checkpoints.key(name)):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        checkpoints.write(name, folder)
    return folder


def judge(name, work):
    """Save, compile and compare one type; -> its result."""
    import llmc
    from llmc.ir.errors import CompileError

    folder = model_folder(name, work)
    started = time.monotonic()
    try:
        path = llmc.compile(
            folder,
            target="cpu",
            output=work / "artifacts" / f"{name}.llmc",
            overwrite=True,
            max_context=configs.variant(name).max_context,
        )
    except CompileError as refusal:
        where = {key: value for key in ("stage", "pass_name", "op") if (value := getattr(refusal, key, None))}
        return {"verdict": "refused", "reason": str(refusal), **where}
    compiled = time.monotonic()
    result = compare(path, folder)
    return result | {"compile": round(compiled - started, 1), "run": round(time.monotonic() - compiled, 1)}


def child(name, work, mutate=False):
    """Write the result of one type into the folder of work. Whatever is raised here is an error of that type."""
    if mutate:
        from . import mutations

        result, kind = mutations.judge(name, work), "mutations"
    else:
        result, kind = judge(name, work), "results"
    (work / kind / f"{name}.json").write_text(json.dumps({"name": name, **result}))
