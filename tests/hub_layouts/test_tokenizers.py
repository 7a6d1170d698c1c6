"""Tokenizers as they are published, without tokenizer.json: the ids are those of the vocabulary itself."""

import pytest
import sentencepiece
import transformers
from transformers import BertTokenizer, CLIPTokenizer, T5Tokenizer

from hub_layouts import vocabularies
from hub_layouts.published import INDICES
from models.embedded.text_encoders import clip_tokenizer

TEXTS = [
    "a red seven on a blue background",
    "A RED  Seven,\non a (blue) background!",
    "Ünïcode ﬁ ½ ①   \u3000 dot\u2026",
    "红色的七 in 蓝底上",
    "</s> <pad> <extra_id_3>?",
    "",
]


@pytest.mark.parametrize("place", ["pixart_alpha/tokenizer", "pixart_sigma/tokenizer", "hunyuan/tokenizer_2"])
def test_t5_tokenizes_as_sentencepiece_does(published_folder, place):
    name, _, folder = place.partition("/")
    tokenizer = T5Tokenizer.from_pretrained(published_folder(name) / folder)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(published_folder(name) / folder / "spiece.model"))
    for text in TEXTS[:4] + TEXTS[5:]:
        assert tokenizer(text).input_ids == [*pieces.encode(text), pieces.eos_id()], text
    assert tokenizer.pad_token_id == 0


@pytest.mark.parametrize("name", ["pixart_alpha", "pixart_sigma"])
def test_t5_has_its_extra_ids_behind_the_pieces(published_folder, name):
    tokenizer = T5Tokenizer.from_pretrained(published_folder(name) / "tokenizer")
    last = vocabularies.num_pieces() + vocabularies.NUM_EXTRA_IDS - 1
    assert tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_99>"]) == [last, last - 99]
    assert len(tokenizer) == last + 1 < vocabularies.t5_vocab_size() and tokenizer.model_max_length == 512


def test_hunyuan_s_t5_has_no_extra_ids(published_folder):
    tokenizer = T5Tokenizer.from_pretrained(published_folder("hunyuan") / "tokenizer_2")
    assert len(tokenizer) == vocabularies.num_pieces() and tokenizer.model_max_length > 10**20


def test_bert_finds_the_lines_of_its_vocabulary(published_folder):
    tokenizer = BertTokenizer.from_pretrained(published_folder("hunyuan") / "tokenizer")
    lines = (published_folder("hunyuan") / "tokenizer" / "vocab.txt").read_text(encoding="utf-8").split("\n")
    pieces = ["a", "red", "seven", ",", "x", "##y", "红", "七"]
    expected = [101, *(lines.index(piece) for piece in pieces), 102]
    assert tokenizer("A Red  seven, xy红七").input_ids == expected
    assert tokenizer("é", padding="max_length").input_ids[:4] == [101, lines.index("e"), 102, 0]
    assert tokenizer("☃").input_ids == [101, 100, 102] and tokenizer.model_max_length == 77


@pytest.mark.parametrize("place", ["sdxl/tokenizer", "sdxl/tokenizer_2", "sdxl_refiner/tokenizer_2", "clip/."])
def test_clip_merges_as_the_same_vocabulary_does_in_memory(published_folder, place):
    name, _, folder = place.partition("/")
    tokenizer = CLIPTokenizer.from_pretrained(published_folder(name) / folder)
    whole = clip_tokenizer()
    for text in TEXTS:
        text = text.replace("!", ".")  # is the padding of some
        assert tokenizer(text).input_ids == whole(text).input_ids, text
    end, padding = len(tokenizer) - 1, 0 if folder == "tokenizer_2" else len(tokenizer) - 1
    assert tokenizer("red").input_ids[-1] == end and tokenizer("red", padding="max_length").input_ids[-1] == padding
    assert len(tokenizer("red " * 99, truncation=True).input_ids) == 77


@pytest.mark.parametrize("name", [name for name in INDICES if name != "dit"])
def test_tokenizers_are_the_same_after_a_tokenizer_json_is_written(published_folder, tmp_path, name):
    """`save_pretrained` of a loaded pipeline's tokenizer, as a fine-tune or a packed folder has it."""
    for folder in sorted(published_folder(name).glob("tokenizer*")):
        kind = getattr(transformers, INDICES[name][folder.name][1])
        published = kind.from_pretrained(folder)
        published.save_pretrained(tmp_path / folder.name)
        assert (tmp_path / folder.name / "tokenizer.json").exists()
        saved = kind.from_pretrained(tmp_path / folder.name)
        for text in TEXTS:
            arguments = {"padding": "max_length", "max_length": 40, "truncation": True}
            assert saved(text, **arguments).data == published(text, **arguments).data, (folder.name, text)
