"""A real artifact served: alone, in any batch, in any chunks, with too small a cache, bit for bit the same."""

from pathlib import Path

import numpy as np

HELDOUT = Path(__file__).parents[1] / "data" / "tiny-python" / "heldout.txt"


def serve(artifact):
    """In a process of its own; -> what should be equal, by name."""
    import llmc

    text = HELDOUT.read_text()
    prompts = [text[at : at + size] for at, size in ((0, 30), (0, 90), (5000, 200), (9000, 3), (9000, 120), (60, 400))]
    ask = {"max_tokens": 12}
    found = {}
    with llmc.load(artifact) as model:
        alone = [model.generate(prompt, **ask) for prompt in prompts]
        found["batch"] = [a.token_ids for a in model.generate(prompts, **ask)], [a.token_ids for a in alone]
        found["stream"] = "".join(chunk.text for chunk in model.stream(prompts[1], **ask)), alone[1].text
        drawn = {"temperature": 1.0, "seed": 3, "max_tokens": 12}
        together = model.generate([prompts[2], prompts[0], prompts[2]], **drawn)
        found["seed"] = (
            [together[0].token_ids] * 2,
            [together[2].token_ids, model.generate(prompts[2], **drawn).token_ids],
        )
        ids = [model.tokenizer.encode(prompt) for prompt in prompts]
        logits = model.logits(ids)
        found["shared beginnings"] = model.generate(prompts[1], **ask).usage["cached_tokens"] > 0, True
        found["held"] = model.engine.pages.held, 0
    with llmc.load(artifact) as model:
        single = [model.logits([one])[0] for one in ids]
        found["ragged logits"] = [x.tobytes() for x in logits] == [x.tobytes() for x in single], True
    with llmc.load(artifact, cache_tokens=220) as model:
        requests = [model.submit(prompt, **ask) for prompt in prompts]
        found["small cache"] = [r.result(60).token_ids for r in requests], [a.token_ids for a in alone]
        found["given back"] = model.engine.pages.held, 0
    return found


def test_one_answer_however_it_is_served(tiny_python, isolated):
    for name, (found, expected) in isolated(serve, str(tiny_python), timeout=300).items():
        assert found == expected, name


def chunks(artifact, size):
    """Logits of one long text, computed `size` tokens a step."""
    from llmc.runtime import model as runtime

    engine = runtime.Engine
    runtime.Engine = lambda executor, **more: engine(executor, **{**more, "max_tokens": size})
    with runtime.load(artifact) as model:
        ids = model.tokenizer.encode(HELDOUT.read_text()[:700])
        return model.logits([ids, ids[:50]])


def test_logits_however_they_are_cut(tiny_python, isolated):
    whole = isolated(chunks, str(tiny_python), 512)
    for size in (7, 64):
        for one, other in zip(whole, isolated(chunks, str(tiny_python), size), strict=True):
            np.testing.assert_array_equal(one, other)
