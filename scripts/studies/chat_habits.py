"""What a chat model keeps of its manners: it ends its turns, and answers in the form asked for.

    python scripts/studies/chat_habits.py prompts FOLDER
    python scripts/studies/chat_habits.py measure FOLDER/questions.jsonl NAME=MODEL ...

`prompts` writes prompts.jsonl, 200 chats of one user's turn for the base to answer, and
questions.jsonl, 100 others. Both ask about topics in five forms; no topic is in both.

`measure` lets models answer the questions greedily and counts the answers that end (the model
writes its end-of-turn token within 192 tokens), and those that end and have the form. The answers
are written beside the questions.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONGEST = 192  # tokens of an answer
AT_ONCE = 20  # questions
FORMS = {
    "word": "Is {} something that people eat? Answer with one word, yes or no.",
    "sentence": "What is {}? Answer in one sentence.",
    "numbers": "Tell me three facts about {}. Give a numbered list from 1 to 3 and nothing else.",
    "bullets": "What is {} good for? Answer with bullet points, each on a line that begins with -.",
    "json": 'Describe {}. Reply with a JSON object with the keys "name" and "description".',
}
TOPICS = (
    "an apple,a bridge,a violin,the moon,bread,a library,a bicycle,salt,a river,a clock,rice,"
    "a mirror,the sun,cheese,a hammer,a forest,paper,a lighthouse,honey,a compass,glass,a horse,"
    "tea,a castle,a battery,wool,an island,a candle,corn,a microscope,snow,a kitchen,a map,"
    "chocolate,a telescope,a garden,iron,a ferry,milk,a school"
)
OTHERS = (
    "a potato,a train,a piano,the ocean,butter,a museum,a boat,pepper,a mountain,a calendar,"
    "a tomato,a window,the wind,yoghurt,a ladder,a desert,cotton,a tunnel,jam,a thermometer"
)
Json = dict[str, Any]


def chats(topics: str) -> list[Json]:
    """One chat for each topic and form; its id begins with the form."""
    return [
        {"id": f"{form}: {topic}", "messages": [{"role": "user", "content": ask.format(topic)}]}
        for topic in topics.split(",")
        for form, ask in FORMS.items()
    ]


def is_word(text: str) -> bool:
    return re.fullmatch(r"\W*(yes|no)\W*", text, re.IGNORECASE) is not None


def is_sentence(text: str) -> bool:
    return re.fullmatch(r"[^\n]+[.!?]", text) is not None and not re.search(r"[.!?]\s+[A-Z]", text)


def is_numbered(text: str) -> bool:
    return [line.split(".")[0].strip() for line in lines(text)] == ["1", "2", "3"]


def is_bulleted(text: str) -> bool:
    return len(lines(text)) > 1 and all(re.match(r"\s*[-*•]\s", line) for line in lines(text))


def is_object(text: str) -> bool:
    """A JSON object with the keys, in a code block or not."""
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL)
    try:
        found = json.loads(fenced[1] if fenced else text)
    except json.JSONDecodeError:
        return False
    return isinstance(found, dict) and {"name", "description"} <= {key.lower() for key in found}


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


CHECKS: dict[str, Callable[[str], bool]] = {
    "word": is_word,
    "sentence": is_sentence,
    "numbers": is_numbered,
    "bullets": is_bulleted,
    "json": is_object,
}


def answers(name: str, questions: list[Json]) -> list[Json]:
    """The answer of a model to each question: id, text, and whether the model ended it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    end, found = tokenizer.eos_token_id, []
    for at in range(0, len(questions), AT_ONCE):
        asked = questions[at : at + AT_ONCE]
        inputs = tokenizer.apply_chat_template(
            [each["messages"] for each in asked],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            rows = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
        for each, row in zip(asked, rows[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            ends = end in row
            text = tokenizer.decode(row[: row.index(end)] if ends else row).strip()
            found.append({"id": each["id"], "answer": text, "ends": ends})
    return found


def write(path: Path, rows: list[Json]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def main(command: str, place: str, *models: str) -> None:
    if command == "prompts":
        Path(place).mkdir(parents=True, exist_ok=True)
        write(Path(place) / "prompts.jsonl", chats(TOPICS))
        write(Path(place) / "questions.jsonl", chats(OTHERS))
        return
    questions = [json.loads(line) for line in Path(place).read_text().splitlines()]
    print(f"of {len(questions):<8}   ends  in form  {'  '.join(FORMS)}")
    for each in models:
        name, _, model = each.partition("=")
        found = answers(model, questions)
        write(Path(place).with_name(f"answers-{name}.jsonl"), found)
        forms = [row["id"].split(":")[0] for row in found if row["ends"]]
        texts = [row["answer"] for row in found if row["ends"]]
        good = Counter(f for f, text in zip(forms, texts, strict=True) if CHECKS[f](text))
        shown = "  ".join(f"{good[form]:>{len(form)}}" for form in FORMS)
        print(f"{name:<11} {len(forms):>6} {good.total():>8}  {shown}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
