import pytest

from contracap.config import ConfigError
from contracap.generation import BeamSearch, ContrastiveReranking, Greedy, LegacyBeamSearch, Rules, Sampling
from contracap.generation.registry import STRATEGIES, build_strategy


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("greedy", (), Greedy()),
        ("beam", ["width=4", "length_penalty=-1"], BeamSearch(width=4, length_penalty=-1.0)),
        ("beam", {"width": 6, "groups": 3, "diversity": 0.5}, BeamSearch(groups=3, diversity=0.5)),
        ("sample", ["top_k=50", "seed=7"], Sampling(top_k=50, seed=7)),
        ("legacy", ["year=2023", "max_tokens=20"], LegacyBeamSearch(2023, 20)),
        ("rerank", (), ContrastiveReranking(Sampling(samples=8))),
        ("rerank", ["of.samples=4", "of.seed=1"], ContrastiveReranking(Sampling(samples=4, seed=1))),
        ("rerank", {"of": {"width": 4}}, ContrastiveReranking(BeamSearch(width=4))),
        (
            "greedy",
            ["rules.no_repeat_ngram=3", "rules.banned=['red', 'a cube']"],
            Greedy(rules=Rules(no_repeat_ngram=3, banned=("red", "a cube"))),
        ),
    ],
)
def test_settings_are_nested_values_or_assignments(name, settings, expected):
    assert build_strategy(name, settings) == expected


@pytest.mark.parametrize(
    ("name", "settings", "fact"),
    [
        ("bem", (), "did you mean 'beam'?"),
        ("magic", (), "there are greedy, beam, sample, legacy, rerank"),
        ("beam", ["widht=4"], "unknown key 'widht'; did you mean 'width'?"),
        ("beam", ["width"], "'width' is not a setting"),
        ("beam", ["max_tokens=1"], "max_tokens must be an integer of at least 2"),
        ("beam", ["width=wide"], "'width' must be an integer, not 'wide'"),
        ("greedy", ["banned=3"], "did you mean 'rules.banned'?"),
        ("greedy", ["rules.banned=3"], "'rules.banned' must be a list, each a string, not 3"),
        ("legacy", (), "key 'year' is missing"),
        ("legacy", ["year=2020"], "year must be 2023 or 2024, not 2020"),
        ("rerank", ["of.sampels=4"], "in 'of': unknown key 'sampels'; did you mean 'samples'?"),
        ("rerank", ["samples=4"], "unknown key 'samples'; the keys here are of"),
        ("rerank", ["of=4"], "'of' must be a table"),
        ("sample", ["top_p=nan"], "'top_p' must be a finite number, not nan"),
    ],
)
def test_a_wrong_setting_is_told_in_one_line(name, settings, fact):
    with pytest.raises(ConfigError) as caught:
        build_strategy(name, settings)
    assert fact in str(caught.value) and f"strategy '{name}'" in str(caught.value) and "\n" not in str(caught.value)


def test_only_reranking_ranks_again_what_another_strategy_writes():
    for name in STRATEGIES:
        strategy = build_strategy(name, {"year": 2024} if name == "legacy" else {})
        assert isinstance(strategy, ContrastiveReranking) == (name == "rerank")
        writer = strategy.of if isinstance(strategy, ContrastiveReranking) else strategy
        assert (writer.max_tokens, writer.num_texts) == (strategy.max_tokens, strategy.num_texts)
