import pytest
import torch

from models.embedded.captions import NUM_PHRASINGS, all_captions
from models.embedded.text_encoders import TEXT_ENCODERS, byte_alphabet, caption_words, load_text_encoder, pooled
from models.pipelines import EMBEDDED_FOLDER

PARTS = EMBEDDED_FOLDER / "parts"
OTHER_TEXT = "Zebras jump, don't they? 42%"
IN_PIECES = {name: {"nine", "three"} for name in ("clip", "clip_projection")}  # merges of earlier words come first
every_encoder = pytest.mark.parametrize("name", list(TEXT_ENCODERS))


def tokens_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


@every_encoder
def test_a_word_of_the_captions_is_one_token_of_its_own(name):
    tokenizer = TEXT_ENCODERS[name][0]()
    tokens = {word: tokens_of(tokenizer, word) for word in caption_words() if word != ","}
    assert {word for word, its in tokens.items() if len(its) > 1} == IN_PIECES.get(name, set())
    assert len(set(map(tuple, tokens.values()))) == len(tokens)
    caption = "a handwritten 3, red on yellow"
    assert len(tokens_of(tokenizer, caption)) == 7  # the comma is one


@every_encoder
def test_other_text_falls_into_characters(name):
    tokenizer = TEXT_ENCODERS[name][0]()
    tokens = tokens_of(tokenizer, OTHER_TEXT)
    assert len(tokens) > 15 and tokenizer.unk_token_id not in tokens and max(tokens) < len(tokenizer)
    assert tokens != tokens_of(tokenizer, "Hebras jump, don't they? 42%")


@every_encoder
def test_a_tokenizer_is_the_same_after_saving(name, tmp_path):
    tokenizer = TEXT_ENCODERS[name][0]()
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again.model_max_length == tokenizer.model_max_length and len(again) == len(tokenizer)
    settings = {"padding": "max_length", "max_length": 77, "truncation": True}
    for text in (*all_captions()[::501], OTHER_TEXT, "", "word " * 100):
        assert again(text, **settings).input_ids == tokenizer(text, **settings).input_ids
        assert len(tokenizer(text, **settings).input_ids) == 77


def test_the_byte_alphabet_is_256_printable_characters():
    letters = byte_alphabet()
    assert len(letters) == len(set(letters)) == 256
    assert all(letter.isprintable() and not letter.isspace() for letter in letters)


@every_encoder
def test_the_trained_tokenizers_are_those_made_here(name):
    tokenizer, _ = load_text_encoder(name, PARTS / name)
    assert tokenizer.get_vocab() == TEXT_ENCODERS[name][0]().get_vocab()


@every_encoder
@torch.no_grad()
def test_pooled_output_tells_digit_and_colours(name):
    """Phrasings of a subject lie nearer to each other than to another subject's: by the nearest subject's mean."""
    tokenizer, encoder = load_text_encoder(name, PARTS / name)
    shown = range(0, 300, 31)
    texts = [all_captions()[subject * NUM_PHRASINGS + way] for subject in shown for way in range(NUM_PHRASINGS)]
    tokens = tokenizer(texts, padding="max_length", max_length=TEXT_ENCODERS[name][2], truncation=True, return_tensors="pt")
    vectors = pooled(encoder(**tokens), tokens.attention_mask).view(len(shown), NUM_PHRASINGS, -1)
    means = vectors[:, ::2].mean(1)  # of the words
    nearest = torch.cdist(vectors[:, 1::2].flatten(0, 1), means).argmin(1).view(len(shown), -1)  # of the numerals
    assert (nearest == torch.arange(len(shown))[:, None]).float().mean() > 0.9
