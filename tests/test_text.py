"""Texts in chunks of 75 tokens, the encoders' states, and what each word weighs."""

import random
import time
from collections.abc import Sequence

import pytest
import tiny_models
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTokenizer

from megaman.common.kinds import SD1, SD2, XL, Kind
from megaman.model.hub import EMBEDDED_FOLDER
from megaman.model.prompt_syntax import BREAK, HEAVIEST, weights_of
from megaman.model.text import (
    Text,
    chunks_of,
    ids_of,
    notes_on_length,
    padded_as,
    read,
    weighted,
    weighted_ids_of,
    widths_of,
)
from megaman.model.tokenizer import clip_tokenizer

BEGIN, END, COMMA, A = 49406, 49407, 267, 320
PLAIN = [
    "mega man, running",
    "",
    "a <|endoftext|> b",
    "wow!!!",
    "it's 2024's 洛克人 🤖",
    "x: y",
    "word, " * 60,
]


def embedded_tokenizer() -> CLIPTokenizer:
    """The embedded base's, with its own ids."""
    return CLIPTokenizer.from_pretrained(EMBEDDED_FOLDER / "tokenizer")


def padded(ids: Sequence[int], pad: int = END) -> list[int]:
    """A chunk of 77."""
    chunk = [BEGIN, *ids, END]
    return chunk + [pad] * (77 - len(chunk))


@pytest.fixture(scope="module")
def xl() -> StableDiffusionPipeline:
    """A tiny XL."""
    return tiny_models.xl_pipeline(embedded_tokenizer())


@pytest.fixture(scope="module")
def sd2() -> StableDiffusionPipeline:
    """A tiny 2.x."""
    return tiny_models.sd2_pipeline(embedded_tokenizer())


def encoders_of(pipeline: StableDiffusionPipeline, kind: Kind) -> dict[str, torch.nn.Module]:
    """Its text encoders by name."""
    return {encoder.part: getattr(pipeline, encoder.part) for encoder in kind.encoders}


def text_of(pipeline: StableDiffusionPipeline, kind: Kind, texts: list[str], most: int = 3) -> Text:
    """What it reads, by our functions."""
    ids = ids_of(pipeline.tokenizer, texts, most)
    return read(ids, encoders_of(pipeline, kind), kind, pipeline.tokenizer)


# ---------------------------------------------------------------- tokens
@pytest.mark.parametrize("tokenizer", [clip_tokenizer(), embedded_tokenizer()], ids=["clip", "embedded"])
def test_one_chunk_is_what_the_tokenizer_itself_pads_and_cuts(tokenizer: CLIPTokenizer) -> None:
    texts = [*PLAIN, "a, " * 36 + "the robot king " * 30]
    theirs = tokenizer(
        texts,
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids
    ours = ids_of(tokenizer, texts, most=1)
    assert (ours.shape, ours.dtype) == ((len(texts), 1, 77), torch.int64)
    assert torch.equal(ours[:, 0], theirs)


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("", [0]),
        ("a " * 75, [75]),
        ("a " * 76, [75, 1]),
        ("a " * 55 + ", " + "a " * 19, [75]),  # full, but nothing follows
        ("a " * 55 + ", " + "a " * 20, [56, 20]),  # the comma is the 20th from the end
        ("a " * 54 + ", " + "a " * 21, [75, 1]),  # one further away
        ("a " * 74 + ", " + "a ", [75, 1]),
        ("a " * 60 + ", a a , " + "a " * 30, [64, 30]),  # the last one of two
        ("a " * 60 + ", " + "a " * 14 + ", a", [75, 2]),  # a comma follows: it may stay with its words
        ("a " * 60 + ", " + "a " * 90, [61, 75, 15]),
        ("a " * 60 + ", " + "a " * 55 + ", " + "a " * 30, [61, 56, 30]),
    ],
)
def test_a_chunk_ends_at_a_comma_that_is_near_its_end(text: str, lengths: list[int]) -> None:
    chunks = chunks_of(clip_tokenizer(), text, most=9)
    assert [len(chunk) for chunk in chunks] == lengths
    whole = clip_tokenizer()(text, add_special_tokens=False).input_ids
    assert [token for chunk in chunks for token in chunk] == whole


def test_what_is_beyond_the_last_chunk_is_cut() -> None:
    text = "a " * 60 + ", " + "a " * 200
    assert [len(chunk) for chunk in chunks_of(clip_tokenizer(), text, most=2)] == [61, 75]
    assert [len(chunk) for chunk in chunks_of(clip_tokenizer(), text, most=1)] == [75]  # no comma rule


def test_texts_of_unequal_length_are_filled_with_empty_chunks() -> None:
    ids = ids_of(clip_tokenizer(), ["a, a", "a " * 225, "a " * 76], most=3)
    full, empty = padded([A] * 75), padded([])
    assert ids.tolist() == [
        [padded([A, COMMA, A]), empty, empty],
        [full, full, full],
        [full, padded([A]), empty],
    ]
    assert ids_of(clip_tokenizer(), ["a"], most=3, at_least=2).tolist() == [[padded([A]), empty]]


def test_an_openclip_encoder_pads_with_0_and_keeps_a_texts_own_exclamation_marks() -> None:
    # The ids are open_clip's; transformers' tokenizer of XL's second encoder makes 0 and 0,0,0 of the marks.
    texts = {"mega man!": [9068, 786, 256], "wow!!!": [2781, 995], "": []}
    ids = ids_of(clip_tokenizer(), list(texts), most=1)
    assert ids[:, 0].tolist() == [padded(own) for own in texts.values()]
    assert padded_as(ids, END, 0)[:, 0].tolist() == [padded(own, pad=0) for own in texts.values()]


def test_each_encoder_is_given_its_own_pad() -> None:
    tokenizer = clip_tokenizer()
    pipeline = tiny_models.xl_pipeline(tokenizer)
    given: dict[str, Tensor] = {}
    for part, module in encoders_of(pipeline, XL).items():
        module.register_forward_pre_hook(lambda _, inputs, part=part: given.update({part: inputs[0]}))
    text_of(pipeline, XL, ["wow!!!"])
    assert given["text_encoder"].tolist() == [padded([2781, 995])]
    assert given["text_encoder_2"].tolist() == [padded([2781, 995], pad=0)]


def test_padding_begins_behind_the_first_end_of_each_row() -> None:
    ids = torch.tensor([[[8, 5, 9, 3, 9], [8, 9, 9, 9, 9]], [[8, 5, 5, 5, 9], [8, 5, 5, 5, 5]]])
    expected = [[[8, 5, 9, 0, 0], [8, 9, 0, 0, 0]], [[8, 5, 5, 5, 9], [8, 5, 5, 5, 5]]]
    assert padded_as(ids, 9, 0).tolist() == expected


def test_a_text_that_is_not_read_to_its_end_is_named_once() -> None:
    def notes(text: str, most: int, **settings: bool) -> list[str]:
        return notes_on_length(clip_tokenizer(), [text, "short", text], most, **settings)

    assert notes("a " * 75, 1) == notes("a " * 225, 3) == notes("a " * 56 + ", " + "a " * 20, 2) == []
    assert notes("a " * 76, 1) == [f"note: a prompt of 76 tokens is cut after 75: {('a ' * 76)[:60]!r}…"]
    assert "of 230 tokens is cut after 225" in notes("a " * 230, 3)[0]
    # The commas leave chunks unfilled, so that a text of less than 150 tokens is not read to its end.
    assert "of 140 tokens is cut after 120" in notes(("a " * 59 + ", ") * 2 + "a " * 20, 2)[0]
    assert notes("(" * 80 + "a", 1, weights_are_read=True) == []
    assert "of 2 tokens is cut after 1" in notes("a BREAK b", 1, weights_are_read=True)[0]


# ---------------------------------------------------------------- states
def test_xl_reads_what_diffusers_pipeline_reads(xl: StableDiffusionPipeline) -> None:
    texts = ["mega man, running", "", "the robot king " * 40]
    states, _, pooled, _ = xl.encode_prompt(texts, device="cpu", do_classifier_free_guidance=False)
    text = text_of(xl, XL, texts, most=1)
    assert states.shape == (3, 77, 32)
    assert torch.equal(text.states, states)
    assert torch.equal(text.pooled, pooled)


@pytest.mark.parametrize("kind", [SD1, SD2], ids=["sd1", "sd2"])
def test_sd_reads_what_diffusers_pipeline_reads(kind: Kind, sd2: StableDiffusionPipeline) -> None:
    pipeline = tiny_models.sd1_pipeline(embedded_tokenizer()) if kind is SD1 else sd2
    texts = ["mega man, running", "", "the robot king " * 40]
    if kind is SD2:  # whose tokenizer pads with "!"
        tokenizer = embedded_tokenizer()
        tokenizer.pad_token = "!"
        theirs = StableDiffusionPipeline(**{**pipeline.components, "tokenizer": tokenizer})
    else:
        theirs = pipeline
    states, _ = theirs.encode_prompt(texts, "cpu", 1, do_classifier_free_guidance=False)
    text = text_of(pipeline, kind, texts, most=1)
    assert text.pooled is None
    assert torch.equal(text.states, states)


def test_sd1s_states_are_the_encoders_last_ones_to_the_bit(sd2: StableDiffusionPipeline) -> None:
    ids = ids_of(sd2.tokenizer, ["mega man", ""], most=3)
    states = read(ids, {"text_encoder": sd2.text_encoder}, SD1, sd2.tokenizer).states
    assert torch.equal(states, sd2.text_encoder(ids[:, 0]).last_hidden_state)


def test_the_last_layers_states_are_normed_and_those_before_are_not(
    sd2: StableDiffusionPipeline, xl: StableDiffusionPipeline
) -> None:
    normed, raw = text_of(sd2, SD2, ["mega man"]).states, text_of(xl, XL, ["mega man"]).states[..., :12]
    assert torch.allclose(normed.var(-1, correction=0), torch.ones(77), atol=1e-2)
    assert not torch.allclose(raw.var(-1, correction=0), torch.ones(77), atol=1e-2)


@pytest.mark.parametrize("kind", [SD2, XL], ids=["sd2", "xl"])
def test_chunks_follow_one_another_and_the_vector_is_the_first_ones(
    kind: Kind, sd2: StableDiffusionPipeline, xl: StableDiffusionPipeline
) -> None:
    pipeline = {SD2: sd2, XL: xl}[kind]
    first, second = " ".join(["mega", "man", "a"] * 25), "blue robot"  # 75 tokens, and the rest
    both = text_of(pipeline, kind, [f"{first} {second}", "short"])
    alone = text_of(pipeline, kind, [first, second, "short", ""])
    width = alone.states.shape[-1]
    assert both.states.shape == (2, 154, width)
    expected = torch.stack([alone.states[[0, 2]], alone.states[[1, 3]]], 1).reshape(2, 154, width)
    assert torch.allclose(both.states, expected, atol=1e-6)
    if kind.encoders[-1].has_pooled:
        assert torch.allclose(both.pooled, alone.pooled[[0, 2]], atol=1e-6)
        assert not torch.allclose(both.pooled, alone.pooled[[1, 3]], atol=1e-2)


def test_a_prompt_of_225_tokens_is_read_to_its_last_word(xl: StableDiffusionPipeline) -> None:
    long = " ".join(["mega", "man", "a"] * 74)  # 222 tokens
    texts = [f"{long} sky blue robot", f"{long} sky blue hero", f"{long} sky blue robot king"]
    text = text_of(xl, XL, texts)
    assert text.states.shape == (3, 231, 32)
    assert not torch.equal(text.states[0], text.states[1])
    assert torch.allclose(text.states[0], text.states[2], atol=1e-6)  # the 226th token is not read
    assert torch.equal(text.pooled[0], text.pooled[1])


def test_gradients_reach_every_encoder(xl: StableDiffusionPipeline) -> None:
    text = text_of(xl, XL, ["mega man", "a " * 80])
    modules = encoders_of(xl, XL).values()
    weights = [
        module.get_submodule("text_model" if hasattr(module, "text_model") else "") for module in modules
    ]
    tables = [module.embeddings.token_embedding.weight for module in weights]
    for part in (text.states, text.pooled):
        gradients = torch.autograd.grad(part.square().sum(), tables, retain_graph=True, allow_unused=True)
        assert gradients[1].abs().sum() > 0
    assert torch.autograd.grad(text.states.square().sum(), tables[0])[0].abs().sum() > 0
    assert not text.detach().states.requires_grad


def test_rows_of_a_text_are_texts() -> None:
    text = Text(torch.arange(24.0).reshape(3, 2, 4), torch.arange(6.0).reshape(3, 2))
    assert (len(text), text.device.type, text.dtype) == (3, "cpu", torch.float32)
    for rows in (slice(1, 3), [1, 2], torch.tensor([1, 2])):
        assert torch.equal(text[rows].states, text.states[1:])
        assert torch.equal(text[rows].pooled, text.pooled[1:])
    joined = Text.cat([text[[2]], text[:2]])
    assert torch.equal(joined.states, text.states[[2, 0, 1]])
    assert torch.equal(joined.pooled, text.pooled[[2, 0, 1]])
    many = text[[1]].expand(4)
    assert (many.states.shape, many.pooled.shape) == ((4, 2, 4), (4, 2))
    assert torch.equal(many.states[3], text.states[1])
    half = text.to("cpu", torch.float16)
    assert half.dtype == half.pooled.dtype == torch.float16
    assert text.to("cpu").dtype == torch.float32


def test_a_text_without_a_vector_has_none_anywhere() -> None:
    text = Text(torch.ones(1, 2, 4))
    for other in (
        text[:1],
        text.to("cpu", torch.float16),
        text.detach(),
        text.expand(3),
        Text.cat([text, text]),
    ):
        assert other.pooled is None


# ---------------------------------------------------------------- weights
@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", [("", 1)]),
        ("mega man", [("mega man", 1)]),
        ("a (b) c", [("a ", 1), ("b", 1.1), (" c", 1)]),
        ("((b))", [("b", 1.21)]),
        ("(b:1.3)", [("b", 1.3)]),
        ("( b : 0.5 ) c", [(" b ", 0.5), (" c", 1)]),
        ("(b:1.)(c:.5)(d:2)", [("b", 1), ("c", 0.5), ("d", 2)]),
        ("(b:-1)(c:+2)(d:0)", [("b", -1), ("c", 2), ("d", 0)]),
        ("[b]", [("b", 1 / 1.1)]),
        ("[[b] c]", [("b", 1 / 1.21), (" c", 1 / 1.1)]),
        ("(a (b:1.5) [c])", [("a ", 1.1), ("b", 1.65), (" ", 1.1), ("c", 1)]),
        ("(a, (b:2), c:0.5)", [("a, ", 0.5), ("b", 1), (", c", 0.5)]),
        ("(a) (b)", [("a", 1.1), (" ", 1), ("b", 1.1)]),
        ("(a)(b)", [("ab", 1.1)]),
        (r"a \(b\) \[c\]", [("a (b) [c]", 1)]),
        (r"(a \(b\):1.3)", [("a (b)", 1.3)]),
        (r"\\(a)", [("\\", 1), ("a", 1.1)]),
        (r"a\b \\ c\\", [(r"a\b \\ c\\", 1)]),
        ("a (b", [("a ", 1), ("b", 1.1)]),
        ("a ((b c", [("a ", 1), ("b c", 1.21)]),
        ("a [b", [("a ", 1), ("b", 1 / 1.1)]),
        ("(a [b)", [("a ", 1.1), ("b", 1)]),  # each kind of bracket is counted apart
        ("a) b] c:1.3)", [("a) b] c:1.3)", 1)]),
        ("[a:1.3)", [("a:1.3)", 1 / 1.1)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a:.)", [("a:.", 1.1)]),
        ("(a:--1)", [("a:--1", 1.1)]),
        ("(a:1.3 b)", [("a:1.3 b", 1.1)]),
        ("(a:" + "9" * 400 + ")", [("a:" + "9" * 400, 1.1)]),
        ("(a:99999)(b:-99999)", [("a", HEAVIEST), ("b", -HEAVIEST)]),
        ("()", [("", 1)]),
        ("a BREAK b", [("a ", 1), BREAK, (" b", 1)]),
        ("BREAKER aBREAK break", [("BREAKER aBREAK break", 1)]),
        ("(a BREAK b:1.3)", [("a ", 1.3), BREAK, (" b", 1.3)]),
        ("(a:-1)BREAK(b:-1)", [("a", -1), BREAK, ("b", -1)]),
        ("BREAK BREAK", [BREAK, (" ", 1), BREAK]),
    ],
)
def test_weights_are_read_as_a1111_reads_them(text: str, pieces: list[tuple[str, float]]) -> None:
    found = weights_of(text)
    assert [words for words, _ in found] == [words for words, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


def some_texts(letters: str, count: int) -> list[str]:
    """Texts of these letters, by chance, but always the same ones."""
    chance = random.Random(0)
    return ["".join(chance.choices(letters, k=chance.randint(0, 30))) for _ in range(count)]


def test_text_without_brackets_weighs_1_and_stays_as_it_is() -> None:
    for text in [*PLAIN, *some_texts("ab \\:1.3-+,BREAK\n洛", 500)]:
        if text and "BREAK" not in text:
            assert weights_of(text) == [(text, 1.0)]


def test_no_heap_of_brackets_breaks_anything_or_loses_a_letter() -> None:
    for text in some_texts("ab (()[[]):1.5\\", 2000):
        pieces = weights_of(text)
        assert all(abs(weight) <= HEAVIEST for _, weight in pieces)
        words = "".join(words for words, _ in pieces)
        assert [letter for letter in words if letter in "ab"] == [letter for letter in text if letter in "ab"]


def test_plain_text_has_the_same_tokens_with_weights_and_without() -> None:
    ids, weights = weighted_ids_of(clip_tokenizer(), PLAIN, most=3, at_least=2)
    assert torch.equal(ids, ids_of(clip_tokenizer(), PLAIN, most=3, at_least=2))
    assert (weights.shape, weights.dtype) == (ids.shape, torch.float32)
    assert torch.equal(weights, torch.ones(ids.shape))


def test_a_token_weighs_what_its_word_does() -> None:
    ids, weights = weighted_ids_of(clip_tokenizer(), ["a (mega man:1.5), [a]", "(a"], most=1)
    assert ids[:, 0].tolist() == [padded([A, 9068, 786, COMMA, A]), padded([A])]
    ones = [1.0] * 71
    expected = [[1, 1, 1.5, 1.5, 1, 1 / 1.1, *ones], [1, 1.1, 1, 1, 1, 1, *ones]]
    assert torch.allclose(weights[:, 0], torch.tensor(expected))


@pytest.mark.parametrize(
    ("text", "chunks"),
    [
        ("a BREAK a a", [[A], [A, A]]),
        ("a BREAK", [[A]]),
        ("BREAK a", [[], [A]]),
        ("a BREAK BREAK a", [[A], [], [A]]),
        ("BREAK", [[]]),
        ("a " * 75 + "BREAK a", [[A] * 75, [A]]),
        ("a " * 60 + ", BREAK " + "a " * 76, [[A] * 60 + [COMMA], [A] * 75, [A]]),
    ],
)
def test_break_begins_a_chunk(text: str, chunks: list[list[int]]) -> None:
    assert weighted_ids_of(clip_tokenizer(), [text], most=9)[0][0].tolist() == [padded(ids) for ids in chunks]


def test_weights_go_along_into_the_next_chunk() -> None:
    ids, weights = weighted_ids_of(clip_tokenizer(), ["a " * 60 + ", (" + "a " * 30 + ":2) a"], most=3)
    assert ids[0].tolist() == [padded([A] * 60 + [COMMA]), padded([A] * 31)]
    assert torch.equal(weights[0, 0], torch.ones(77))
    assert weights[0, 1].tolist() == [1.0] + [2.0] * 30 + [1.0] * 46


def test_without_weights_states_come_back_to_the_bit() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        text = Text(torch.randn(2, 154, 8).to(dtype), torch.randn(2, 4))
        assert torch.equal(weighted(text, torch.ones(2, 2, 77)).states, text.states)
        weights = torch.ones(2, 2, 77)
        weights[0, 1, 3] = 1.5
        found = weighted(text, weights)
        assert found.dtype == dtype
        assert torch.equal(found.states[0, :77], text.states[0, :77])  # the other chunk
        assert torch.equal(found.states[1], text.states[1])  # the neighbour
        assert not torch.equal(found.states[0, 77:], text.states[0, 77:])
        assert found.pooled is text.pooled


def test_each_chunk_keeps_its_mean_and_the_words_their_proportions() -> None:
    text = Text(torch.randn(2, 154, 8) + 1)
    weights = torch.rand(2, 2, 77) + 0.5
    found = weighted(text, weights).states.reshape(2, 2, 77, 8)
    original = text.states.reshape(2, 2, 77, 8)
    assert torch.allclose(found.mean((2, 3)), original.mean((2, 3)), atol=1e-5)
    factors = found / original / weights[..., None]  # one number a chunk
    assert torch.allclose(factors, factors[:, :, :1, :1].expand_as(factors), rtol=1e-4)
    assert factors.flatten(2).std(-1).max() < 1e-3 < abs(factors[0, 0, 0, 0] - 1)


def test_each_encoders_states_keep_their_own_mean(xl: StableDiffusionPipeline) -> None:
    assert widths_of(encoders_of(xl, XL), XL) == [12, 20]
    text = Text(torch.cat([torch.randn(1, 77, 4) + 1, torch.randn(1, 77, 6) - 30], -1))
    weights = torch.rand(1, 1, 77) + 0.5
    found = weighted(text, weights, [4, 6]).states
    first = weighted(Text(text.states[..., :4]), weights).states
    second = weighted(Text(text.states[..., 4:]), weights).states
    assert torch.equal(found, torch.cat([first, second], -1))
    assert not torch.allclose(found, weighted(text, weights).states)


def test_weights_that_leave_no_mean_leave_numbers() -> None:
    text = Text(torch.ones(1, 77, 4))
    weights = torch.tensor([1.0, -1.0] * 38 + [0.0]).reshape(1, 1, 77)
    found = weighted(text, weights).states
    assert torch.equal(found, weights.reshape(1, 77, 1).expand(1, 77, 4))


def test_rows_of_brackets_cost_no_time() -> None:
    started = time.monotonic()
    for text in ("(" * 9_000 + "a", "(" * 9_000 + "a" + ")" * 9_000, "[(" * 5_000 + "a)]" * 5_000):
        assert "a" in "".join(words for words, _ in weights_of(text))
    assert time.monotonic() - started < 5
