"""One token per printable ASCII character, as a standard transformers tokenizer.

103 tokens: 8 special ones, then the characters from space to tilde. 103 is prime, so no tile of a
kernel divides this vocabulary.

A prompt is framed as ``<bos> text <sep>``; the answer starts right after. Padding goes to the left,
because generation appends canvases on the right.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# The ids of padding, end and beginning are those of Gemma.
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<sep>", "<boi>", "<eoi>", "<image>")
PAD, EOS, BOS, UNK, SEP, BOI, EOI, IMAGE = range(len(SPECIAL_TOKENS))
CHARACTERS = tuple(chr(code) for code in range(ord(" "), ord("~") + 1))
VOCAB_SIZE = len(SPECIAL_TOKENS) + len(CHARACTERS)


def build_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS + CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <sep>", special_tokens=[("<bos>", BOS), ("<sep>", SEP)]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        sep_token="<sep>",
        additional_special_tokens=["<boi>", "<eoi>", "<image>"],
        padding_side="left",
    )
