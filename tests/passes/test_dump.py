from llmc.passes import manager
from llmc.passes.dump import Dump
from llmc.passes.goal import Goal
from llmc.passes.pipeline import PIPELINE
from tests import textbook


def test_one_file_a_pass_that_changed_something(tmp_path):
    manager.run(textbook.llama(layers=1), Goal(), stages=PIPELINE[:1], on_pass=Dump(tmp_path / "dump"))
    files = sorted(f.name for f in (tmp_path / "dump").iterdir())
    assert files == ["02-drop_batch_axis.diff"]
    written = (tmp_path / "dump" / files[0]).read_text()
    assert written.startswith("--- drop_batch_axis before\n+++ drop_batch_axis after\n")
    assert '-    def main(tokens: R.Tensor((1, n), dtype="int32")' in written
    assert '+    def main(tokens: R.Tensor((n,), dtype="int32")' in written
