"""Tokenizers and streaming decode: Chinese by jieba and byte-pair merges, English as GPT-2."""

from .files import load_tokenizer
from .jiebabpe import train_jiebabpe
from .protocol import Tokenizer
from .stream import StreamDecoder

__all__ = ["StreamDecoder", "Tokenizer", "load_tokenizer", "train_jiebabpe"]
