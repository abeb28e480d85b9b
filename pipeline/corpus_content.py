"""What decides the documents of a corpus: the columns that are read, and what its files hold."""

import hashlib
import json
from typing import Any

from pipeline.config import CorpusConfig
from pipeline.conversation_source import ConversationSource
from pipeline.corpus_readers import Source
from pipeline.token_columns import TokenColumns
from pipeline.token_source import TokenSource


def columns_of(config: CorpusConfig) -> tuple[str, ...]:
    """The columns that documents are made of; those of masks and ids are beside them."""
    if config.prompt_column is not None and config.completion_column is not None:
        return config.prompt_column, config.completion_column
    return (config.tokens_column or config.messages_column or config.text_column,)


def is_structured(config: CorpusConfig) -> bool:
    """Whether documents are conversations, or prompts with completions."""
    return config.messages_column is not None or config.prompt_column is not None


def guesses_mask(config: CorpusConfig) -> bool:
    """Whether the first document decides which column masks the tokens."""
    is_open = config.mask_column is None and config.targets != "all"
    return config.tokens_column is not None and is_open


def plain_sources(config: CorpusConfig, copies: list[tuple[str, str]]) -> list[Source]:
    """What reads the first column of files, given by (name, path of its local copy)."""
    return [Source(*each, columns_of(config)[0]) for each in copies]


def sources_of(
    config: CorpusConfig, copies: list[tuple[str, str]], tokens: TokenColumns | None
) -> list[Source]:
    """What reads each file, given by (name, path of its local copy); `tokens` are the columns where
    documents are token ids."""
    columns = columns_of(config)
    if tokens is not None:
        guessed = guesses_mask(config)
        return [TokenSource(*each, columns[0], columns=tokens, guessed=guessed) for each in copies]
    if is_structured(config):
        return [ConversationSource(*each, columns[0], True, columns=columns) for each in copies]
    return plain_sources(config, copies)


def fingerprint_of(config: CorpusConfig, tokens: TokenColumns | None, content: list[Any]) -> str:
    """sha256 over the content, [path, sha256] of every file, and over the selection."""
    column, *more = columns_of(config)
    mask = [] if tokens is None else [{"mask": tokens.mask}]
    found = [column, config.skip, config.limit, *mask, *more, *content]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()
