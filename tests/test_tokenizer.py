"""CLIP's tokenizer from the table that ships with us."""

import pytest

from megaman.model.tokenizer import clip_tokenizer


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("mega man!", [9068, 786, 256]),
        ("wow!!!", [2781, 995]),
        (
            "洛克人, naïve café 🤖",
            [162, 112, 249, 34314, 233, 21078, 374, 267, 1097, 35689, 563, 15304, 46146],
        ),
        ("Mega  Man, (robot:1.2)", [9068, 786, 267, 263, 8797, 281, 272, 269, 273, 264]),
        ("it's 2024's", [585, 568, 273, 271, 273, 275, 568]),
        ("", []),
    ],
)
def test_its_ids_are_those_of_openais_own_code(text: str, ids: list[int]) -> None:
    # By open_clip 3.3.0's SimpleTokenizer, which is OpenAI's.
    assert clip_tokenizer()(text).input_ids == [49406, *ids, 49407]


def test_it_pads_and_cuts_as_stable_diffusion_1_wants() -> None:
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49408
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (49406, 49407, 49407)
    padded = tokenizer("a", padding="max_length", truncation=True).input_ids
    assert padded == [49406, 320] + [49407] * 75
    assert len(tokenizer("word " * 200, truncation=True).input_ids) == tokenizer.model_max_length == 77
