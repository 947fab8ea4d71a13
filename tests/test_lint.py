"""Every problem that the linter knows, and a spec that has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import SENTENCES, tiny
from tokenizers import Tokenizer, models, trainers
from transformers import PreTrainedTokenizerFast

from verbtune import Backbone, BackboneError
from verbtune.encode import tokenize
from verbtune.lint import Problem, lint, spell
from verbtune.task import Task, bundled_tasks


def make(template: str = "{text} It was {answer}.", words: dict[str, list[str]] | None = None, **more: Any) -> Task:
    return Task.from_dict(
        {"task": "tone", "template": template, "verbalizer": words or {"bad": ["terrible"], "good": ["great"]}, **more}
    )


def found(problems: list[Problem], level: str) -> list[str]:
    return [problem.message for problem in problems if problem.level == level]


def test_a_good_spec_has_no_problem(masked: Backbone, task: Task) -> None:
    assert lint(task) == []
    assert lint(task, masked) == []


@pytest.mark.parametrize(
    ("template", "remedy"),
    [
        ("{text} It was{answer}.", "'was {answer}'"),
        ("{text}It was {answer}.", "'{text} It'"),
        ("{text} Answer:{answer}", "'Answer: {answer}'"),
        ("Review:{text} It was {answer}.", "'Review: {text}'"),
        ("{text} It was {answer}ly done.", "'{answer} ly'"),
        ("{text}{answer}", "'{text} {answer}'"),
        ("{text} It was{soft:4}{answer}", "'was {answer}'"),
    ],
)
def test_missing_space(template: str, remedy: str) -> None:
    (problem,) = lint(make(template))
    assert problem.level == "warning"
    assert problem.message.startswith("template: no space between ")
    assert problem.message.endswith(f"write {remedy}")


@pytest.mark.parametrize(
    "template",
    [
        '"{text}" It was ({answer}).',
        "{soft:8}{text} It was {soft:2} {answer}!",
        "{text}{soft:In summary it was}{answer}",
        "{text}总之很{answer}",
        "{answer}: {text}",
    ],
)
def test_no_space_is_missing(template: str) -> None:
    assert lint(make(template)) == []


def test_both_templates_are_checked() -> None:
    (problem,) = lint(make(template_causal="{text} So{answer}"))
    assert problem.message.startswith("template_causal: no space between 'So' and '{answer}'")


def test_words_that_split_are_named_with_their_tokens(masked: Backbone) -> None:
    words = {"bad": ["bad"], "good": ["great", "goodish"]}
    (message,) = found(lint(make(words=words), masked), "warning")
    pieces = "|".join(masked.tokenizer.tokenize("goodish"))
    assert message.startswith(f"verbalizer: several tokens for 1 of 3 label words: 'goodish' ({pieces}); ")
    assert "scored whole" in message


def test_words_that_share_a_first_piece(causal: Backbone) -> None:
    messages = found(
        lint(make("{text} So: {answer}", {"a": ["goodness me"], "b": ["great"], "c": ["goodbye you"]}), causal),
        "warning",
    )
    (message,) = [m for m in messages if "multi_token='first'" in m]
    assert "'▁good' ('goodness me', 'goodbye you')" in message
    assert "'great'" not in message


def test_words_of_one_class_may_share_a_first_piece(causal: Backbone) -> None:
    words = {"a": ["goodness me", "goodbye you"], "b": ["great"]}
    assert not any("multi_token='first'" in p.message for p in lint(make("{text} So: {answer}", words), causal))


def test_words_that_are_the_same_tokens(masked: Backbone) -> None:
    words = {"bad": ["Great"], "good": ["great"]}  # the tokenizer lowers the case
    (message,) = found(lint(make(words=words), masked), "error")
    assert message == "verbalizer: 'Great' (bad) and 'great' (good) are the same tokens; choose words that differ"


def test_a_word_that_continues_another_never_wins_on_a_causal_lm(masked: Backbone, causal: Backbone) -> None:
    task = make("{text} So: {answer}", {"good": ["good"], "very": ["good to the end"]})
    assert any("'good to the end' goes on where 'good' ends" in m for m in found(lint(task, causal), "warning"))
    assert not any("goes on" in problem.message for problem in lint(task, masked))


def test_unknown_words(masked: Backbone) -> None:
    problems = lint(make("{text} 是 {answer}.", {"bad": ["坏"], "good": ["great"]}), masked)
    assert found(problems, "error") == ["verbalizer: bad: the tokenizer does not know '坏'; use another word"]
    assert found(problems, "warning") == ["template: the tokenizer does not know all of '是'; rephrase it"]


def test_words_of_very_different_length(masked: Backbone) -> None:
    words = {"bad": ["bad"], "good": ["great great great"]}
    assert (
        "verbalizer: words differ in tokens, from 1 for 'bad' to 3 for 'good'; "
        "scores are sums over tokens and favour 'bad' until calibrated or tuned"
    ) in found(lint(make(words=words), masked), "warning")


def test_text_after_the_answer_on_a_causal_lm(masked: Backbone, causal: Backbone) -> None:
    template = "It was {answer}: {text}"
    assert lint(make(template), masked) == []
    (message,) = found(lint(make(template), causal), "error")
    assert message == (
        "template: a causal LM cannot read ': {text}' after {answer}; give a template_causal that ends with {answer}"
    )
    assert found(lint(make(template, template_causal="{text} It was {answer}"), causal), "error") == []


def test_no_room_for_the_text(masked: Backbone) -> None:
    (message,) = found(lint(make("{soft:150} {text} It was {answer}."), masked), "error")
    assert "take 156 of 160 tokens and leave 4 for the text" in message
    assert found(lint(make(), masked, prompt_length=150), "error") == [message]
    assert found(lint(make(), masked, soft=False, prompt_length=150), "error") == []


def test_little_room_for_the_text(masked: Backbone) -> None:
    (message,) = found(lint(make(), masked, max_length=26), "warning")
    assert "take 6 of 26 tokens and leave 20 for the text" in message


def test_texts_that_are_cut(masked: Backbone) -> None:
    rows = [{"text": "good"}, {"text": "good " * 200}]
    (message,) = found(lint(make(truncate={"text": "middle"}), masked, rows=rows), "warning")
    assert message == (
        "1 of 2 texts are longer than the 154 tokens that the template leaves; they are cut (truncate: {text: middle})"
    )


def test_classes_of_data_and_spec() -> None:
    problems = lint(make(), labels=["bad", "ugly", "ugly"])
    assert found(problems, "error") == [
        "verbalizer: the data has classes that the spec lacks: 'ugly' (2 rows); "
        "add them, or correct the labels to bad, good"
    ]
    assert found(problems, "warning") == [
        "verbalizer: the data has no rows of 'good'; what is trained on it never answers so"
    ]


def test_errors_come_first() -> None:
    assert [p.level for p in lint(make("{text} It was{answer}"), labels=["ugly"])] == ["error", "warning", "warning"]


def test_tokens_that_cross_words() -> None:
    crossing = Tokenizer(models.BPE())  # without a pre-tokenizer, "was great" can become "was |great"
    crossing.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=300))
    backbone = Backbone(tiny("gpt2").model, PreTrainedTokenizerFast(tokenizer_object=crossing))
    (message,) = [
        m for m in found(lint(make(words={"bad": ["bad"], "good": ["good"]}), backbone), "warning") if "cuts" in m
    ]
    assert message.startswith("template: this tokenizer cuts '…was bad' as ")
    assert message.endswith("around {answer}; expect poor scores")


def test_running_text_is_cut_as_the_prompt_is(backbone: Backbone) -> None:
    assert not any("running text" in problem.message for problem in lint(make(), backbone))


@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2", "qwen3"])
def test_a_backbone_without_weights_encodes_the_same(architecture: str, tmp_path: Path) -> None:
    backbone = tiny(architecture)
    backbone.model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    light = Backbone.load(tmp_path, weights=False)
    assert (light.kind, light.max_length, light.width) == (backbone.kind, backbone.max_length, backbone.width)
    assert {p.device.type for p in light.model.parameters()} == {"meta"}
    assert tokenize(light.tokenizer, ["It was great."], lead=True) == tokenize(
        backbone.tokenizer, ["It was great."], lead=True
    )


def test_a_model_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="cannot load the language model"):
        Backbone.load(tmp_path, weights=False)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    tiny("bert").tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="neither a masked nor a causal LM"):
        Backbone.load(tmp_path, weights=False)


def test_tokens_are_spelled_for_people() -> None:
    tokenizer = tiny("gpt2").tokenizer
    (ids,) = tokenize(tokenizer, ["great\nIt"], lead=True)
    assert spell(tokenizer, ids) == ["▁great", "\\n", "It"]


def test_bundled_specs_are_spaced_and_fit_both_kinds(masked: Backbone, causal: Backbone) -> None:
    for task in bundled_tasks():
        assert lint(task) == [], task.task
        assert not any("cannot read" in p.message for p in lint(task, causal)), task.task
