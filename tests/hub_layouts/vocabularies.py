"""Small vocabularies in the published tokenizers' files: SentencePiece, WordPiece, byte pairs.

The words are those of the embedded models' captions; any other text falls into characters.
"""

import functools
import io
import json

import sentencepiece

from models.embedded.captions import all_captions
from models.embedded.text_encoders import CHARACTERS, caption_words, clip_tokenizer

NUM_EXTRA_IDS = 100
EXTRA_IDS = [f"<extra_id_{number}>" for number in range(NUM_EXTRA_IDS)]
WORDPIECE_SPECIAL = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
PLAIN = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
CLIP_TOKEN = PLAIN | {"normalized": True}


@functools.cache
def sentencepiece_model():
    """Bytes of a unigram model, its first pieces as T5's: padding, end, unknown."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*all_captions()[::7], *CHARACTERS]),
        model_writer=model,
        vocab_size=200,
        character_coverage=1.0,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def num_pieces():
    return sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model()).get_piece_size()


def t5_vocab_size():
    """Rows of a T5's embedding: pieces, extra ids and, as in the published ones, some that nothing has."""
    return num_pieces() + NUM_EXTRA_IDS + 28


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_t5(folder, with_added_tokens):
    """PixArt-alpha's four files, or PixArt-Sigma's three, which an older version wrote."""
    _write_spiece(folder)
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = special | {
        "additional_special_tokens": EXTRA_IDS,
        "clean_up_tokenization_spaces": True,
        "extra_ids": NUM_EXTRA_IDS,
        "model_max_length": 512,
        "sp_model_kwargs": {},
        "tokenizer_class": "T5Tokenizer",
    }
    extra_ids = {token: num_pieces() + NUM_EXTRA_IDS - 1 - number for number, token in enumerate(EXTRA_IDS)}
    if with_added_tokens:
        write_json(folder / "added_tokens.json", extra_ids)
        ids = {"<pad>": 0, "</s>": 1, "<unk>": 2} | dict(sorted(extra_ids.items(), key=lambda item: item[1]))
        config |= {"added_tokens_decoder": _decoder(ids), "legacy": True}
        special = {name: {"content": token} | PLAIN for name, token in special.items()}
    write_json(folder / "special_tokens_map.json", {"additional_special_tokens": EXTRA_IDS} | special)
    write_json(folder / "tokenizer_config.json", config)


def write_mt5(folder):
    """Hunyuan-DiT's: no extra ids, any length."""
    _write_spiece(folder)
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = special | {
        "add_prefix_space": True,
        "added_tokens_decoder": _decoder({"<pad>": 0, "</s>": 1, "<unk>": 2}),
        "additional_special_tokens": [],
        "clean_up_tokenization_spaces": True,
        "extra_ids": 0,
        "legacy": True,
        "model_max_length": 1000000000000000019884624838656,
        "sp_model_kwargs": {},
        "tokenizer_class": "T5Tokenizer",
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", {name: {"content": token} | PLAIN for name, token in special.items()})


def _write_spiece(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(sentencepiece_model())


def _decoder(ids):
    return {str(number): {"content": token} | PLAIN | {"special": True} for token, number in ids.items()}


def wordpieces():
    """The lines of vocab.txt: special tokens at BERT's own places, characters, a few Chinese ones, words."""
    unused = iter(f"[unused{number}]" for number in range(1, 100))
    places = {place: token for token, place in WORDPIECE_SPECIAL.items()}
    head = [places.get(place) or next(unused) for place in range(104)]
    tail = [*CHARACTERS, *(f"##{c}" for c in CHARACTERS), *"红色的七在蓝底上", *caption_words()]
    return list(dict.fromkeys(head + tail))


def write_bert(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(wordpieces()) + "\n", encoding="utf-8")
    special = {f"{token[1:-1].lower()}_token": token for token in WORDPIECE_SPECIAL}
    config = special | {
        "added_tokens_decoder": _decoder(WORDPIECE_SPECIAL),
        "clean_up_tokenization_spaces": True,
        "do_basic_tokenize": True,
        "do_lower_case": True,
        "model_max_length": 77,
        "never_split": None,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
        "tokenizer_class": "BertTokenizer",
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", {name: {"content": token} | PLAIN for name, token in special.items()})


def clip_model():
    """Vocabulary and merges of the small byte pair model; the end token is the last of it, as in the published one."""
    return json.loads(clip_tokenizer().backend_tokenizer.to_str())["model"]


def write_clip(folder, pad_token="<|endoftext|>"):
    folder.mkdir(parents=True, exist_ok=True)
    model = clip_model()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    tokens = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special = {name: {"content": token} | CLIP_TOKEN for name, token in tokens.items()} | {"pad_token": pad_token}
    write_json(folder / "special_tokens_map.json", special)
    typed = {name: {"__type": "AddedToken", "content": token} | CLIP_TOKEN for name, token in tokens.items()}
    config = typed | {
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": pad_token,
        "tokenizer_class": "CLIPTokenizer",
    }
    write_json(folder / "tokenizer_config.json", config)
