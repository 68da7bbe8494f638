from types import SimpleNamespace

from llmc.passes.goal import Goal


def test_facts_have_a_default_where_the_target_is_unknown():
    assert Goal().fact("keys_token_last", False) is False
    assert Goal(target=SimpleNamespace(keys_token_last=True)).fact("keys_token_last", False) is True
    assert Goal(target=SimpleNamespace()).fact("keys_token_last", False) is False
