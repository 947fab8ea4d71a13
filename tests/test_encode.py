"""Encoding: user text never becomes structure, and truncation never touches anything but user text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, CAUSAL, MASKED, SENTENCES, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from verbtune.backbone import Backbone
from verbtune.batch import collate
from verbtune.compiled import CompiledTask, compile_task
from verbtune.encode import Example, Layout, compile_layout, encode, tokenize
from verbtune.task import Task, TaskError

quick = settings(max_examples=40, deadline=None, derandomize=True)

SPECIALS = [
    "[MASK]",
    "[CLS]",
    "[SEP]",
    "[PAD]",
    "<s>",
    "</s>",
    "<pad>",
    "<mask>",
    "<|endoftext|>",
    "{answer}",
    "{text}",
]
hostile = st.lists(
    st.one_of(st.sampled_from(SPECIALS), st.text("aZ é中🙂\0\t\n\r\u200b\u202e\ufeff[]<>|{}/▁Ġ#'", max_size=6)),
    max_size=8,
).map("".join)


def make(template: str = "{text} It was {answer}.", **rest: Any) -> Task:
    spec = {"task": "t", "template": template, "verbalizer": {"n": ["bad"], "p": ["good"]}}
    return Task.from_dict(spec | rest)


PAIR = make("{text_a}? {answer}, {text_b}", template_causal="{text_a} {text_b} So {answer}")


def layout(backbone: Backbone, task: Task, *, max_length: int = 60, **options: Any) -> Layout:
    return compile_layout(task, backbone.tokenizer, backbone.kind, max_length=max_length, **options)


def encoded(backbone: Backbone, task: Task, text: str = "A film", *, max_length: int = 60, **options: Any) -> Example:
    made = layout(backbone, task, max_length=max_length, **options)
    (example,) = encode(made, [dict.fromkeys(task.fields, text)], backbone.tokenizer)
    return example


def specials(backbone: Backbone, ids: list[int]) -> list[int]:
    """The special ids in order, the one for unknown characters aside."""
    tokenizer = backbone.tokenizer
    return [i for i in ids if i in tokenizer.all_special_ids and i != tokenizer.unk_token_id]


# -- text stays text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["bert", "roberta", "deberta-v2", "gpt2", "llama"])
def test_hostile_text_adds_no_special_token_and_moves_no_answer(architecture: str) -> None:
    backbone = tiny(architecture)
    mask = backbone.tokenizer.mask_token_id
    task = make("Text: {text} It was {answer}.")
    plain = encoded(backbone, task)
    made = layout(backbone, task)
    start = plain.ids[: made.n_prefix]
    end = plain.ids[len(plain.ids) - (made.n_constant - made.n_prefix) :]

    @quick
    @given(hostile)
    def check(text: str) -> None:
        (example,) = encode(made, [{"text": text}], backbone.tokenizer)
        assert specials(backbone, example.ids) == specials(backbone, plain.ids)
        assert example.ids[: made.n_prefix] == start
        assert example.ids[len(example.ids) - len(end) :] == end
        assert set(example.slots) == {-1}
        assert len(example.ids) == len(example.slots) <= 60
        if backbone.kind == "masked":
            assert example.ids[example.answer] == mask
            assert example.ids.count(mask) == 1
        else:
            assert example.answer == len(example.ids) - 1

    check()


@pytest.mark.parametrize("text", SPECIALS)
def test_a_special_token_in_a_text_is_the_letters_that_spell_it(backbone: Backbone, text: str) -> None:
    example = encoded(backbone, make("{text} {answer}"), f"so {text} it is")
    before, after = len(encoded(backbone, make("{text} {answer}"), "so").ids), len(example.ids)
    assert after >= before + 5  # three words and more than one piece for what is no word
    assert specials(backbone, example.ids) == specials(backbone, encoded(backbone, make("{text} {answer}"), "so").ids)


def test_braces_in_a_text_or_a_demonstration_are_no_template(masked: Backbone) -> None:
    shots = [({"text": "{answer} {text} [MASK] {soft:9}"}, "good")]
    example = encoded(masked, make(), "{answer} {text}", demonstrations=shots, max_length=160, soft=True)
    tokens = masked.tokenizer.convert_ids_to_tokens(example.ids)
    assert tokens.count("[MASK]") == 1
    assert set(example.slots) == {-1}
    assert "answer" in "".join(tokens).replace("##", "")


# -- what an example looks like ----------------------------------------------------------------------------------------


def test_a_masked_example_reads_as_the_template(masked: Backbone) -> None:
    example = encoded(masked, make(), "A great film")
    assert masked.tokenizer.convert_ids_to_tokens(example.ids) == (
        ["[CLS]", "a", "great", "film", "it", "was", "[MASK]", ".", "[SEP]"]
    )
    assert example.answer == 6


def test_a_causal_example_ends_before_its_answer(causal: Backbone) -> None:
    example = encoded(causal, make(), "A great film")
    assert causal.tokenizer.decode(example.ids) == "A great film It was"
    assert example.answer == len(example.ids) - 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_special_tokens_are_those_of_the_tokenizer(architecture: str) -> None:
    backbone = tiny(architecture)
    tokenizer = backbone.tokenizer
    wanted = [i for i in tokenizer("a")["input_ids"] if i in tokenizer.all_special_ids]
    example = encoded(backbone, make())
    if architecture in MASKED:
        assert [i for i in specials(backbone, example.ids) if i != tokenizer.mask_token_id] == wanted
        assert example.ids[0] == wanted[0]
        assert example.ids[-1] == wanted[-1]
    else:  # nothing may end what the answer continues
        assert specials(backbone, example.ids) == wanted[:1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stretches_are_tokenized_as_in_one_text(architecture: str) -> None:
    """With spaces between them, cutting a prompt into stretches changes no token."""
    backbone = tiny(architecture)
    example = encoded(backbone, make("Review: {text} All in all it was {answer}"), "a great film", max_length=100)
    whole = tokenize(backbone.tokenizer, ["Review: a great film All in all it was"], lead=False)[0]
    frame = specials(backbone, example.ids)
    assert [i for i in example.ids if i not in frame] == whole


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_leading_space_is_added_once(architecture: str) -> None:
    tokenizer = tiny(architecture).tokenizer
    (ids,) = tokenize(tokenizer, ["good"], lead=True)
    assert ids == tokenize(tokenizer, ["it was good"], lead=False)[0][-len(ids) :]


def test_tokenizing_nothing_gives_nothing(masked: Backbone) -> None:
    assert tokenize(masked.tokenizer, [], lead=True) == []


def test_white_space_around_a_text_changes_nothing(backbone: Backbone) -> None:
    assert encoded(backbone, make(), " \n A film\t ") == encoded(backbone, make(), "A film")


@pytest.mark.parametrize(
    ("template", "lead"), [("{text} is {answer}", True), ("{text} ({answer})", False), ("{text}{answer}", False)]
)
def test_the_space_before_the_answer_belongs_to_the_word(masked: Backbone, template: str, lead: bool) -> None:
    assert layout(masked, make(template)).answer_lead is lead


def test_rows_stay_in_order_and_do_not_mix(backbone: Backbone) -> None:
    task = make()
    made = layout(backbone, task)
    together = encode(made, [{"text": s} for s in SENTENCES], backbone.tokenizer)
    assert together == [encode(made, [{"text": s}], backbone.tokenizer)[0] for s in SENTENCES]
    assert encode(made, [], backbone.tokenizer) == []


# -- soft slots --------------------------------------------------------------------------------------------------------


def test_slots_count_up_in_reading_order(backbone: Backbone) -> None:
    task = make("{soft:2} {text} {soft:in short} It was{soft:1} {answer}.")
    made = layout(backbone, task, soft=True)
    example = encoded(backbone, task, soft=True)
    n = len(tokenize(backbone.tokenizer, ["in short"], lead=True)[0])
    assert [s for s in example.slots if s >= 0] == list(range(2 + n + 1)) == list(range(len(made.slot_tokens)))
    assert made.slot_tokens[:2] == (None, None)
    assert list(made.slot_tokens[2 : 2 + n]) == tokenize(backbone.tokenizer, ["in short"], lead=True)[0]
    assert made.slot_tokens[-1] is None


def test_tuning_the_template_makes_its_own_tokens_slots_and_nothing_else(backbone: Backbone) -> None:
    task = make("Text: {text} It was {answer}.")
    plain, tuned = encoded(backbone, task), encoded(backbone, task, soft=True, tune_template=True)
    assert tuned.ids == plain.ids
    assert tuned.answer == plain.answer
    made = layout(backbone, task, soft=True, tune_template=True)
    at = [i for i, s in enumerate(tuned.slots) if s >= 0]
    assert [tuned.ids[i] for i in at] == list(made.slot_tokens)
    literal = (
        layout(backbone, task).n_constant
        - (backbone.kind == "masked")
        - len([i for i in specials(backbone, plain.ids) if i != backbone.tokenizer.mask_token_id])
    )
    assert len(at) == literal
    assert tuned.slots[tuned.answer] == -1 or backbone.kind == "causal"


def test_without_soft_slots_soft_text_stands_as_text(backbone: Backbone) -> None:
    assert encoded(backbone, make("{soft:in short} {text} {soft:9}{soft} it was {answer}")) == (
        encoded(backbone, make(" in short {text} it was {answer}"))
    )


def test_soft_tokens_go_in_front_unless_the_template_says_where(backbone: Backbone) -> None:
    front = encoded(backbone, make(), soft=True, prompt_length=3).slots
    first = front.index(0)
    assert front[first : first + 3] == [0, 1, 2]
    assert first == len(specials(backbone, encoded(backbone, make()).ids[:1]))
    inside = encoded(backbone, make("{text} {soft} It was {answer}"), soft=True, prompt_length=3).slots
    assert inside.index(0) > first + 1


@pytest.mark.parametrize("architecture", CAUSAL)
def test_only_a_pure_prefix_counts_as_one(architecture: str) -> None:
    backbone = tiny(architecture)
    options: dict[str, Any] = {"soft": True, "prompt_length": 4}
    assert layout(backbone, make(), **options).n_soft_prefix == 4
    assert layout(backbone, make("{soft:2} Text: {text} {answer}"), **options).n_soft_prefix == 2
    assert not layout(backbone, make("{text} {soft} {answer}"), **options).n_soft_prefix
    assert not layout(backbone, make(), tune_template=True, **options).n_soft_prefix
    assert not layout(backbone, make("{soft:2} Text {soft:2} {text} {answer}"), **options).n_soft_prefix
    assert not layout(backbone, make(), soft=True).n_soft_prefix


# -- truncation --------------------------------------------------------------------------------------------------------

NUMBERED = " ".join(f"w{i}" for i in range(300))


@pytest.mark.parametrize("side", ["tail", "head", "middle"])
def test_a_long_text_keeps_the_right_part_and_nothing_else_changes(backbone: Backbone, side: str) -> None:
    task = make("{soft:2} Text: {text} It was {soft:so very}{answer}.", truncate={"text": side})
    long, short = (encoded(backbone, task, t, soft=True, max_length=50) for t in (NUMBERED, "A film"))
    made = layout(backbone, task, max_length=50, soft=True)
    assert len(long.ids) == 50
    room = 50 - made.n_constant
    kept = long.ids[made.n_prefix : made.n_prefix + room]
    (whole,) = tokenize(backbone.tokenizer, [NUMBERED], lead=True)
    front, back = {"tail": (room, 0), "head": (0, room), "middle": (room - room // 2, room // 2)}[side]
    assert kept == whole[:front] + whole[len(whole) - back :]
    n = len(short.ids) - made.n_constant
    for now, then in ((long.ids, short.ids), (long.slots, short.slots)):
        assert now[: made.n_prefix] == then[: made.n_prefix]
        assert now[made.n_prefix + room :] == then[made.n_prefix + n :]


def test_a_text_that_just_fits_is_whole(backbone: Backbone) -> None:
    whole = encoded(backbone, make(), SENTENCES[0], max_length=160)
    assert encoded(backbone, make(), SENTENCES[0], max_length=len(whole.ids)) == whole
    assert len(encoded(backbone, make(), SENTENCES[0], max_length=len(whole.ids) - 1).ids) == len(whole.ids) - 1


@pytest.mark.parametrize(
    ("lengths", "kept"), [((300, 5), (-5, 5)), ((5, 300), (5, -5)), ((300, 200), (0, 0)), ((4, 5), (4, 5))]
)
def test_a_pair_shares_the_room(causal: Backbone, lengths: tuple[int, int], kept: tuple[int, int]) -> None:
    """Short texts stay whole, long ones share what is left."""
    made = layout(causal, PAIR, max_length=60)
    room = 60 - made.n_constant
    wanted = [room + k if k < 0 else k or room // 2 for k in kept]
    row = {"text_a": " film" * lengths[0], "text_b": " bad" * lengths[1]}
    (example,) = encode(made, [row], causal.tokenizer)
    tokens = causal.tokenizer.convert_ids_to_tokens(example.ids)
    # The first of text_a has no space before it and may be several pieces.
    assert tokens.count("Ġbad") == pytest.approx(wanted[1], abs=1)
    assert tokens.count("Ġfilm") == pytest.approx(wanted[0], abs=4)
    assert len(example.ids) == min(60, len(example.ids))
    if sum(lengths) > room:
        assert len(example.ids) == 60


def test_each_field_is_cut_on_its_own_side(causal: Backbone) -> None:
    task = make("{text_a} {text_b} So {answer}", truncate={"text_a": "head", "text_b": "tail"})
    made = layout(causal, task, max_length=40)
    row = {"text_a": "bad " * 50 + "great", "text_b": "film " + "good " * 50}
    text = causal.tokenizer.decode(encode(made, [row], causal.tokenizer)[0].ids)
    assert " great film good" in text


def test_200000_characters_and_nul_are_a_text_like_any_other(backbone: Backbone) -> None:
    example = encoded(backbone, make(), "a\0 great [MASK] film " * 10_000)
    assert len(example.ids) == 60
    mask = backbone.tokenizer.mask_token_id
    assert example.answer == (59 if backbone.kind == "causal" else example.ids.index(mask))
    assert example.ids[-2:] == encoded(backbone, make(), "so").ids[-2:]


@pytest.mark.parametrize("text", ["\0", "\u200b", "\ufeff\0", "\x7f"])
def test_a_text_that_the_tokenizer_drops_leaves_the_template(backbone: Backbone, text: str) -> None:
    example = encoded(backbone, make(), text)
    assert len(example.ids) >= layout(backbone, make()).n_constant
    assert example.answer < len(example.ids)


def test_a_prompt_that_leaves_no_room_is_refused(backbone: Backbone) -> None:
    with pytest.raises(TaskError, match=r"t.yaml: template, prompt and demonstrations take \d+ of 60 positions"):
        layout(backbone, Task.from_dict(make().to_dict(), source="t.yaml"), soft=True, prompt_length=55)


def test_a_label_word_too_long_for_the_room_is_refused(backbone: Backbone) -> None:
    """The pieces of a label word need positions too; a text must not lose all of its own to them."""
    task = make(verbalizer={"n": ["bad"], "p": ["good " * 36 + "film"]})
    with pytest.raises(TaskError, match="no room for the text"):
        compile_task(task, backbone, max_length=40)


@pytest.mark.parametrize("length", [24, 30, 45])
def test_with_long_label_words_examples_stay_within_the_limit(backbone: Backbone, length: int) -> None:
    task = make("{text} {answer}", verbalizer={"n": ["bad"], "p": ["good good good good"]})
    made: CompiledTask = compile_task(task, backbone, max_length=length)
    (example,) = made.encode([{"text": NUMBERED}])
    assert len(example.ids) + made.words.longest - 1 == length


def test_a_tokenizer_that_cannot_be_framed_is_refused(masked: Backbone) -> None:
    class Odd:
        def __call__(self, text: str, add_special_tokens: bool, split_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [1, 5, 2] if add_special_tokens else [4]}

    with pytest.raises(TaskError, match="the tokenizer Odd changes 'a' when it adds its special tokens"):
        compile_layout(make(), Odd(), "masked", max_length=60)  # type: ignore[arg-type]


def test_every_call_makes_the_same_setting_of_the_tokenizer(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays set between calls, so another one would reach into texts that a thread beside it tokenizes."""
    settings = []
    kind = type(backbone.tokenizer)
    original = kind._encode_plus

    def spy(self: Any, *args: Any, **options: Any) -> Any:
        settings.append(options.get("split_special_tokens"))
        return original(self, *args, **options)

    monkeypatch.setattr(kind, "_encode_plus", spy)
    compile_task(make(), backbone).encode([{"text": "[MASK]"}])
    assert len(settings) > 4
    assert all(settings)


# -- constants and batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"soft": True, "prompt_length": 3}, {"soft": True, "tune_template": True}])
def test_constants_are_constant(backbone: Backbone, options: dict[str, Any]) -> None:
    task = make("Text: {text} It was {answer}.")
    made = layout(backbone, task, **options)
    examples = encode(made, [{"text": s} for s in SENTENCES], backbone.tokenizer)
    assert made.n_prefix > 0
    assert len({(tuple(e.ids[: made.n_prefix]), tuple(e.slots[: made.n_prefix])) for e in examples}) == 1
    assert len({tuple(e.ids[: made.n_prefix + 1]) for e in examples}) > 1
    after = made.n_constant - made.n_prefix
    assert len({(tuple(e.ids[-after:]), tuple(e.slots[-after:])) for e in examples}) == 1


def test_demonstrations_are_constant_text_before_the_template(causal: Backbone) -> None:
    shots = [({"text": " A great film "}, "good"), ({"text": "dull"}, "bad")]
    task = make("{soft:3}{text} It was {answer}.")
    made = layout(causal, task, demonstrations=shots, max_length=100, soft=True, tune_template=True)
    (example,) = encode(made, [{"text": "slow"}], causal.tokenizer)
    solved = "A great film It was good\n\n" + "dull It was bad\n\n"
    shown = [i for i, s in zip(example.ids, example.slots, strict=True) if s == -1]
    assert causal.tokenizer.decode(shown).startswith(solved)
    assert example.slots.index(0) >= len(causal.tokenizer(solved)["input_ids"]) - 2


def test_a_batch_is_padded_on_the_right() -> None:
    examples = [Example([5, 6, 7], [-1, 0, -1], 1), Example([8], [-1], 0)]
    batch = collate(examples, pad_id=9)
    assert batch.ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch.attention.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.slots.tolist() == [[-1, 0, -1], [-1, -1, -1]]
    assert batch.answers.tolist() == [[1], [0]]


def test_the_places_of_the_texts_are_known_and_move_with_the_masks() -> None:
    examples = [Example([5, 6, 4, 7, 8], [-1] * 5, 2, ((0, 2), (3, 4))), Example([5, 4], [-1] * 2, 1, ((0, 1),))]
    assert collate(examples, pad_id=9, mask_id=4).texts.tolist() == [[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]]
    assert collate(examples, pad_id=9, mask_id=4, n_masks=2).texts.tolist() == [[1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0]]


def test_encoding_says_where_each_text_stands(backbone: Backbone) -> None:
    task = make("{text_b} and {text_a}: {answer}")
    made = layout(backbone, task, max_length=80)
    (example,) = encode(made, [{"text_a": "great film", "text_b": "good bad"}], backbone.tokenizer)
    (start, stop), (then, end) = example.texts
    assert example.ids[then:end] == tokenize(backbone.tokenizer, ["great film"], lead=True)[0]
    assert example.ids[start:stop] == tokenize(backbone.tokenizer, ["good bad"], lead=False)[0]


def test_a_part_of_an_example_keeps_what_is_in_it() -> None:
    whole = Example([5, 6, 7, 8, 9, 4], [-1, 0, -1, -1, 1, -1], 5, ((0, 1), (2, 4)))
    assert whole.part(0, 3) == Example([5, 6, 7], [-1, 0, -1], 2, ((0, 1), (2, 3)))
    assert whole.part(3) == Example([8, 9, 4], [-1, 1, -1], 2, ((0, 1),))
    assert whole.part(0) == whole


def test_a_cropped_example_loses_the_ends_of_its_texts_only() -> None:
    whole = Example([5, 6, 7, 8, 9, 4, 3], [-1, 0, -1, -1, 1, -1, -1], 5, ((0, 1), (2, 5)), 3)
    assert whole.cropped(9) == whole
    assert whole.cropped(1) == Example([5, 6, 7, 4, 3], [-1, 0, -1, -1, -1], 3, ((0, 1), (2, 3)), 3)


def test_a_text_without_tokens_at_the_end_is_cropped_to_itself() -> None:
    whole = Example([5, 6, 7], [-1] * 3, 2, ((1, 3), (3, 3)))
    assert whole.cropped(9) == whole
    assert whole.cropped(1) == Example([5, 6], [-1] * 2, 1, ((1, 2), (2, 2)))


def test_a_causal_answer_that_is_a_text_stays_where_the_text_ends() -> None:
    whole = Example([5, 6, 7], [-1] * 3, 2, ((1, 3),))
    assert whole.cropped(1).answer == 1


def test_a_label_word_of_three_pieces_gets_three_masks() -> None:
    examples = [Example([5, 4, 7], [0, -1, 1], 1), Example([4], [-1], 0)]
    batch = collate(examples, pad_id=9, mask_id=4, n_masks=3)
    assert batch.ids.tolist() == [[5, 4, 4, 4, 7], [4, 4, 4, 9, 9]]
    assert batch.slots.tolist() == [[0, -1, -1, -1, 1], [-1] * 5]
    assert batch.answers.tolist() == [[1, 2, 3], [0, 1, 2]]
    assert batch.attention.dtype == torch.long
