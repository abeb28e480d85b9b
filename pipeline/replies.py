"""Conversations that the base answers, turn by turn; each becomes one document.

An answer takes the place of the assistant's turn, and the next turn follows it. A conversation is
kept where the chat template writes each answer back as the base gave it, so that whoever reads the
document reads what the base wrote.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from transformers import PreTrainedTokenizerBase

from pipeline.chats import BadChat, ChatTemplate, listed
from pipeline.config import GenerateConfig
from pipeline.corpus import Corpus
from pipeline.errors import ConfigError
from pipeline.progress import say
from pipeline.spans import Text
from pipeline.special_tokens import CannotMask, SpecialTokens, special_ids
from pipeline.types import Json

PROBE = "the answer"
CALLS = ("tool_calls", "function_call")

# Why a conversation is no document, as a result and a message have it.
NOTHING = "without a user's turn"
TOOLS = "with tool calls"
NO_ROOM = "whose prompt leaves no room under max_length"
CUT = "with an answer cut at max_length"
EMPTY = "with an empty answer"
CHANGED = "with an answer that the chat template writes in another way"


class Answers(Protocol):
    """Token ids that follow each prompt, up to max_length; the last one is of `ends`, or the answer
    was cut. `turn` is the number of the answer in its conversation."""

    def __call__(
        self, prompts: list[list[int]], numbers: list[int], turn: int, ends: list[int]
    ) -> list[list[int]]: ...


@dataclass
class Conversation:
    """A conversation while it is answered."""

    number: int
    document: int
    before: list[list[Json]]
    """The messages before each answer, that follow the answer before."""
    tools: Any = None
    """What the template is told of tools."""
    messages: list[Json] = field(default_factory=list)
    """What was said so far."""
    prompt: str = ""
    prompt_ids: list[int] = field(default_factory=list)
    """The latest prompt: all that was said before the answer, as the chat template has it."""
    answers: list[list[int]] = field(default_factory=list)
    dropped: str | None = None
    """Why it is no document."""

    @property
    def tokens(self) -> int:
        """Of the whole conversation."""
        return len(self.prompt_ids) + len(self.answers[-1])


class Replies:
    """Answers the conversations of `config.prompts`.

    Raises ConfigError where the model has no chat template, or nothing ends its turns, and later
    for a conversation that the template does not take. `eos` are the ids that end any text.
    """

    def __init__(
        self, config: GenerateConfig, tokenizer: PreTrainedTokenizerBase, eos: list[int]
    ) -> None:
        assert config.prompts is not None
        assert config.replies is not None
        self.replies, self.max_length = config.replies, config.max_length
        self.tokenizer = tokenizer
        prompts = replace(config.prompts, targets="all")
        self.corpus = Corpus(prompts, tokenizer, config.max_length)
        self.template = self.chat_template()
        try:
            self.look_at_template(eos)
        except BadChat as error:
            raise ConfigError(f"prompts {config.prompts.path}: {error}") from error.__cause__
        self.said = False

    def chat_template(self) -> ChatTemplate:
        """That of the corpus, or one for the texts of users."""
        split = self.corpus.config.special_tokens == "split"
        try:
            return self.corpus.chat or ChatTemplate(
                self.tokenizer, SpecialTokens(self.tokenizer, chat=True) if split else None
            )
        except BadChat as error:
            raise ConfigError(
                f"replies: the model's tokenizer has no chat template ({error}). Use a chat model"
            ) from None

    def look_at_template(self, eos: list[int]) -> None:
        """Find what the template writes around an answer.

        `ends` are the ids that end an answer: that of the template, and those of the model. `lead`
        is what the template adds before an answer, which the base writes itself; `opening` is what
        the generation prompt has of it, such as <think>.
        """
        question = user("a question")
        prompt = self.template.prompt([question])
        text = self.template.render([question, assistant(PROBE)])
        start, found, behind = text.rpartition(PROBE)
        self.lead = start.removeprefix(prompt) if start.startswith(prompt) else ""
        self.opening = prompt.removeprefix(start) if found and prompt.startswith(start) else ""
        token = first_token(behind.lstrip(), special_ids(self.tokenizer)) if found else None
        self.ends = sorted({*eos} | ({token} if token is not None else set()))
        if not self.ends:
            raise ConfigError(
                f"model {self.tokenizer.name_or_path}: nothing ends a turn, neither a special token"
                " of its chat template nor an end-of-text token. Use a chat model"
            )
        if token is None:
            say(
                "the chat template writes no special token behind an answer; the model's "
                "end-of-text token ends it, which the documents do not have"
            )

    def answered(self, span: range, first: int, answers: Answers) -> list[Conversation]:
        """The conversations of these documents, with their answers; `first` is the first one's
        number."""
        found = [self.conversation(document, number) for number, document in enumerate(span, first)]
        turn = 0
        while asked := [each for each in found if self.ask(each, turn)]:
            prompts = [each.prompt_ids for each in asked]
            numbers = [each.number for each in asked]
            given = answers(prompts, numbers, turn, self.ends)
            for each, answer in zip(asked, given, strict=True):
                self.take(each, answer)
            turn += 1
        self.say_once([each for each in found if not each.dropped])
        return found

    def say_once(self, kept: list[Conversation]) -> None:
        """Say that the template leaves out parts of earlier answers, where it does."""
        if not self.said and not all(map(self.shown, kept)):
            self.said = True
            say(
                "the chat template leaves out parts of answers, such as their reasoning, once the "
                "conversation goes on. The documents have them; replies: last shows all"
            )

    def conversation(self, document: int, number: int) -> Conversation:
        try:
            messages, tools = self.messages_of(document)
            checked = [
                self.template.message(each, f"message {at}") for at, each in enumerate(messages)
            ]
        except BadChat as error:
            raise self.bad(document, error) from None
        before = turns(checked, self.replies)
        dropped = None if before else NOTHING
        if self.replies == "all" and any(map(calls_tools, checked)):
            before, dropped = [], TOOLS
        return Conversation(number, document, before, tools, dropped=dropped)

    def messages_of(self, document: int) -> tuple[list[Any], Any]:
        """(the messages of a document, its tools). A text is the user's."""
        corpus = self.corpus
        (value,) = corpus.values(document, document + 1)
        if not corpus.structured:
            text = "" if value is None else corpus.as_text(value, corpus.column, document)
            return ([user(text)] if text.strip() else []), None
        if value is None or any(name not in value for name in corpus.columns):
            return [], None
        parts = [value[name] for name in corpus.columns]
        if isinstance(parts[0], str) and corpus.config.prompt_column is not None:
            return ([user(parts[0])] if parts[0].strip() else []), None
        return [message for part in parts for message in listed(part)], value.get("tools")

    def ask(self, what: Conversation, turn: int) -> bool:
        """Make the prompt of the next answer, and say whether there is one."""
        if what.dropped or turn >= len(what.before):
            return False
        what.messages += what.before[turn]
        try:
            text = self.template.prompt(what.messages, what.tools)
            what.prompt, what.prompt_ids = text, self.ids_of(text)
        except (BadChat, CannotMask) as error:
            raise self.bad(what.document, error) from error.__cause__
        if len(what.prompt_ids) >= self.max_length:
            what.dropped = NO_ROOM
        return what.dropped is None

    def ids_of(self, text: Text) -> list[int]:
        """The template writes its own special tokens."""
        if text.spelled:
            assert self.template.special is not None
            return self.template.special.encode(text)[0]
        found = self.tokenizer(str(text), add_special_tokens=False, verbose=False)
        ids: list[int] = found["input_ids"]
        return ids

    def take(self, what: Conversation, answer: list[int]) -> None:
        """Add an answer, or say why it cannot be."""
        if not answer or answer[-1] not in self.ends:
            what.dropped = CUT
            return
        what.answers.append(answer[:-1])
        text = self.text_of(what.prompt_ids, answer[:-1])
        if not text.strip():
            what.dropped = EMPTY
            return
        message = self.message(what, text)
        if message is None:
            what.dropped = CHANGED
        else:
            what.messages.append(message)

    def text_of(self, prompt: list[int], answer: list[int]) -> str:
        """What the answer adds to the prompt: some tokenizers leave out a space at the start."""
        before, whole = (self.decoded(ids) for ids in (prompt, prompt + answer))
        return whole[len(before) :] if whole.startswith(before) else self.decoded(answer)

    def decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def message(self, what: Conversation, answer: str) -> Json | None:
        """The message that the template writes as the answer; None where there is none.

        What the template adds in front is left out, and white space where the template strips it;
        what the generation prompt begins is put in front.
        """
        own = answer.removeprefix(self.lead)
        whole = what.prompt + answer
        for content in (answer, self.opening + answer, own, *stripped(own)):
            message = assistant(content)
            try:
                text = self.template.render([*what.messages, message], what.tools)
            except BadChat as error:
                raise self.bad(what.document, error) from error.__cause__
            if text.startswith((whole, what.prompt + content)):
                return message
        return None

    def bad(self, document: int, error: BadChat | CannotMask) -> ConfigError:
        return ConfigError(f"prompts {self.corpus.config.path}, document {document}: {error}")

    def shown(self, what: Conversation) -> bool:
        """Whether the whole conversation still has each answer. Some templates leave out the
        reasoning of earlier turns."""
        text, at = self.template.render(what.messages, what.tools), 0
        for message in what.messages:
            if message["role"] == "assistant" and isinstance(message.get("content"), str):
                found = text.find(message["content"], at)
                if found < 0:
                    return False
                at = found + len(message["content"])
        return True


def turns(messages: list[Json], which: Literal["all", "last"]) -> list[list[Json]]:
    """The messages before each answer that is asked for, from the one before; none without a user.

    The assistant's messages that follow one another are one turn. Those before any user stay.
    """
    found: list[list[Json]] = [[]]
    is_open = False  # whether a user spoke, so that an answer may follow
    for message in messages:
        if message["role"] == "assistant" and is_open:
            if found[-1]:
                found.append([])
        else:
            is_open = is_open or message["role"] == "user"
            found[-1].append(message)
    if not is_open:
        return []
    found = found if found[-1] else found[:-1]
    if which == "all":
        return found
    last = len(messages)
    while messages[last - 1]["role"] == "assistant":
        last -= 1
    return [messages[:last]]


def calls_tools(message: Json) -> bool:
    return message["role"] in ("tool", "function") or any(name in message for name in CALLS)


def stripped(text: str) -> tuple[str, str, str]:
    return text.rstrip(), text.lstrip(), text.strip()


def user(text: str) -> Json:
    return {"role": "user", "content": text}


def assistant(text: str) -> Json:
    return {"role": "assistant", "content": text}


def first_token(text: str, tokens: dict[str, int]) -> int | None:
    """The special token that a text begins with, the longest one."""
    found = [token for token in tokens if text.startswith(token)]
    return tokens[max(found, key=len)] if found else None
