"""Small text encoders and tokenizers in the real ones' classes: T5, BERT and the two CLIPs.

The tokenizers' vocabularies are made here, of the captions' words and of single characters for
any other text. The encoders learn to tell a caption's digit and colours from their pooled output
in seconds, and are then left as they are while the denoisers learn, as in the real systems.
"""

import itertools
import string

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from models.embedded.captions import NUM_PHRASINGS, all_captions, digit_and_colors
from models.embedded.digits import PALETTE

CLIP_TOKENS = BERT_TOKENS = 77
CHARACTERS = string.ascii_lowercase + string.ascii_uppercase + string.digits + string.punctuation


def caption_words():
    """Every word of the captions, punctuation apart."""
    return sorted({word for text in all_captions() for word in text.replace(",", " ,").split()})


def t5_tokenizer():
    """Unigram model: a caption's word is one piece, any other text falls into characters."""
    words = [(f"▁{word}", -1.0) for word in caption_words() if word != ","]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words, ("▁", -6.0), *((c, -8.0) for c in CHARACTERS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def bert_tokenizer():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*caption_words(), *CHARACTERS, *(f"##{c}" for c in CHARACTERS)]
    vocabulary = {piece: place for place, piece in enumerate(dict.fromkeys(special + pieces))}
    return BertTokenizer(vocab=vocabulary, model_max_length=BERT_TOKENS)


def clip_tokenizer():
    """Byte pair merges that build each caption word letter by letter; other text stays bytes.

    "nine" and "three" stay in three pieces: merges of words before them in the list come first.
    """
    letters = byte_alphabet()
    merges = []
    for word in caption_words():
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        heads = itertools.accumulate(pieces)
        merges += [pair for pair in zip(heads, pieces[1:], strict=False) if pair not in merges]
    merged = ["".join(pair) for pair in merges]
    special = ["<|startoftext|>", "<|endoftext|>"]
    pieces = dict.fromkeys([*letters, *(f"{letter}</w>" for letter in letters), *merged, *special])
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_TOKENS)


def byte_alphabet():
    """The 256 printable characters that stand for bytes in byte-level vocabularies (Radford et al., 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    return [chr(byte) for byte in printable] + [chr(256 + place) for place, _ in enumerate(others)]


def t5_encoder(tokenizer):
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=48,
        d_kv=12,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config)


def bert_encoder(tokenizer):
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=BERT_TOKENS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config)


def clip_config(tokenizer):
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=96,
        projection_dim=32,
        num_hidden_layers=3,  # Stable Diffusion XL reads the last but one
        num_attention_heads=4,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def clip_encoder(tokenizer):
    return CLIPTextModel(clip_config(tokenizer))


def projecting_clip_encoder(tokenizer):
    return CLIPTextModelWithProjection(clip_config(tokenizer))


# name -> (tokenizer, encoder, tokens that a text is padded to in training)
TEXT_ENCODERS = {
    "t5": (t5_tokenizer, t5_encoder, 32),
    "bert": (bert_tokenizer, bert_encoder, BERT_TOKENS),
    "clip": (clip_tokenizer, clip_encoder, CLIP_TOKENS),
    "clip_projection": (clip_tokenizer, projecting_clip_encoder, CLIP_TOKENS),
}


def pooled(output, mask):
    """One vector [B, D] per caption: the encoder's own pooled output, else the mean of its tokens."""
    for name in ("text_embeds", "pooler_output"):
        if output.get(name) is not None:
            return output[name]
    mask = mask.unsqueeze(-1).to(output.last_hidden_state.dtype)  # [B, T, 1]
    return (output.last_hidden_state * mask).sum(1) / mask.sum(1)


def train_text_encoder(name, device, steps=1500, batch_size=128):
    """(tokenizer, encoder) by name, the encoder trained to tell digit, ink and paper from its pooled output.

    Also returns the share of all captions of which it tells all three.
    """
    torch.manual_seed(0)
    make_tokenizer, make_encoder, num_tokens = TEXT_ENCODERS[name]
    tokenizer = make_tokenizer()
    captions = all_captions()
    tokens = tokenizer(captions, padding="max_length", max_length=num_tokens, truncation=True, return_tensors="pt").to(
        device
    )
    subjects = [digit_and_colors(place // NUM_PHRASINGS) for place in range(len(captions))]
    answers = torch.tensor(subjects, device=device)  # [3600, 3]
    encoder = make_encoder(tokenizer).to(device)
    heads = nn.ModuleList(nn.LazyLinear(size, device=device) for size in (10, len(PALETTE), len(PALETTE)))

    def logits(pick):
        mask = tokens.attention_mask[pick]
        hidden = pooled(encoder(input_ids=tokens.input_ids[pick], attention_mask=mask), mask)
        return [head(hidden) for head in heads]

    logits(torch.arange(2))  # gives the heads their size
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc=name, mininterval=5):
        pick = torch.randint(len(captions), (batch_size,)).to(device)
        loss = sum(F.cross_entropy(out, answer) for out, answer in zip(logits(pick), answers[pick].T, strict=True))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        told = torch.stack([out.argmax(1) for out in logits(torch.arange(len(captions)))], dim=1)  # [3600, 3]
    return tokenizer, encoder.eval().requires_grad_(False), (told == answers).all(1).float().mean().item()


def load_text_encoder(name, folder):
    """(tokenizer, encoder) by name, as they stand in `folder`."""
    make_tokenizer, make_encoder, _ = TEXT_ENCODERS[name]
    tokenizer = type(make_tokenizer()).from_pretrained(folder)
    return tokenizer, type(make_encoder(tokenizer)).from_pretrained(folder, dtype=torch.float32)
