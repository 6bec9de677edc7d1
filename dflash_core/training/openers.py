"""Beginnings of prompts for the target to finish, by category; knows no model and no file but the user's own list.

What a draft model learns depends on what its data asks about. Left alone a target writes mostly small talk, so a share
of the prompts starts as maths, code, summaries and so on. Slots in braces are filled at random, for variety.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dflash_core.errors import TrainingError

FREE = "free"

OPENERS: Mapping[str, Sequence[str]] = {
    FREE: ("",),
    "maths": (
        "{name} has {n}|{name} buys {n}|{name} bought {n}|{name} sells {n}|{name} earns ${n}|{name} is {n} years old|"
        "{name} and {name2} have|{name} and {name2} went to|{name} needs to|{name} wants to buy|{name} makes {n}|"
        "{name} spends {n} hours|{name} read {n} pages|{name} drove {n} miles|{name} baked {n}|"
        "{name} works {n} hours|{name}'s garden has {n}|{name} is planning a party for {n}|{name} saved ${n}|"
        "{name} ran {n}|{name} collects|A {place} sells {n}|A {place} has {n}|At a {place}, there are {n}|"
        "The {place} opened with {n}|A train travels {n}|A class of {n} students|There are {n} people|"
        "A farmer has {n}|A box contains {n}|In a {place}, {n}|A recipe calls for {n}|A factory produces {n}|"
        "One week, {name}|Every day, {name}|Last year, {name}|If {n} workers can|The sum of two numbers is {n}|"
        "What is {n} percent of|Solve for x: {n}x|Calculate the area of"
    ).split("|"),
    "code": (
        "Write a Python function to {verb} {object}|Write a Python function that takes {object} and|"
        "Write a function in Python that|Implement a Python function `{verb}_{noun}(|"
        "How do I {verb} {object} in Python?|"
        "Write a solution to the following problem and make sure that it passes the tests:\n"
        "```python\n\ndef {verb}_{noun}(|"
        "Write a solution to the following problem and make sure that it passes the tests:\n"
        "```python\nfrom typing import List\n\n\ndef {verb}_{noun}(|"
        "Complete the following Python function:\n```python\ndef {verb}_{noun}(|"
        "Fix the bug in this Python code:\n```python\ndef |Explain what this Python code does:\n```python\n|"
        "Write a JavaScript function that|Write a SQL query that|Write a Python class for|"
        "Write a Python program that|Write unit tests for|Given a list of {noun}, write|Create a Python script to|"
        "Write a recursive function to {verb}|def {verb}_{noun}("
    ).split("|"),
    "chat": (
        "I'm|I've been|Hi,|Hello!|Can you|Could you|My|I need|I want to|I'm thinking about|Help me|What should I|"
        "Do you|I just|Tell me about|Give me some advice on|Recommend|I'm trying to|Let's|How do I {activity}?|"
        "I want to {activity}. What should I|What is the best way to {activity}|I would like to {activity}, but I|"
        "Give me some tips to {activity}|What do I need to {activity}|Suggest some|"
        "Suggest three ways to {activity}|My friend wants to {activity}|My {person} asked me to|"
        "Write a message to my {person}|Write a short message|Help me write|I have to give a speech|Is it better to|"
        "How can I help my {person}|How do I tell my {person}|What are good first steps to|"
        "Should I {activity} or|What are the pros and cons of|Make a list of things|Plan a weekend|I need ideas for|"
        "I have only {n} minutes a day to {activity}|Explain to my {person} how|Tell me a story about a {thing}"
    ).split("|"),
    "explain": (
        "What is|What are the|Why do|Why is|How does|How do|Explain|Explain to a child how|What causes|Describe the|"
        "Who was|When did|What is the difference between|How can I|What happens when|Compare|"
        "What are the benefits of {topic}|Explain {topic} in simple terms|What is the history of {topic}|"
        "Is it true that|How does a {thing} work?|What is {topic}, and why|Why do some people|Why do we|"
        "What is the difference between a {thing} and a|Explain {topic} with an everyday example|"
        "How did people|Why are there|What would happen if"
    ).split("|"),
    "summary": (
        "Summarize the following text:\n\n{Topic}|Summarize this article in three sentences:\n\n|"
        "Give a short summary of this passage:\n\nThe|"
        "What are the main points of the following paragraph?\n\n{Topic}|Write a title for this text:\n\nIn|"
        "Extract the key facts from this text:\n\n{name}|Rewrite this text so that it is shorter:\n\nThe|"
        "Summarize the following email:\n\nDear|TL;DR:\n\n|Summarise this text in one sentence.\n\n{Topic}|"
        "Sum up the following article in a few sentences.\n\nThe|Shorten this message.\n\nDear"
    ).split("|"),
    "translate": (
        "Translate to {language}: |Translate the following sentence to {language}:\n|How do you say|What does|"
        "Translate this into English:\n"
    ).split("|"),
    "write": (
        "Write a short story about|Write a poem about {topic}|Write an email to|Write a letter to|"
        "Write an essay about {topic}|Write a product description for|Create a list of|Give me five ideas for|"
        "Make a plan for|Rewrite the following:\n|Correct the grammar in this sentence:\n|Write a dialogue between|"
        "Write a speech|List|Create a"
    ).split("|"),
}

SHARES: Mapping[str, float] = {
    FREE: 0.08,
    "maths": 0.21,
    "code": 0.19,
    "chat": 0.20,
    "explain": 0.14,
    "summary": 0.07,
    "translate": 0.03,
    "write": 0.08,
}

_WORDS: Mapping[str, Sequence[str]] = {
    "name": (
        "Tom Sarah James Maria Ahmed Lily Ben Emma Carlos Mia John Anna David Sophie Raj Nina Peter Olivia Mark "
        "Grace Kevin Zoe Luis Hannah Omar Ella Sam Julia Mike Rosa Alex Wendy Jack Priya Leo Karen Tim Diana Eric "
        "Fatima Paul Amy Joe Betty Dan Ruth"
    ).split(),
    "place": (
        "bakery shop school farm library theater restaurant hotel zoo museum bookstore factory market garage "
        "hospital gym store cafe"
    ).split(),
    "verb": (
        "count find sort remove reverse merge check filter group replace sum convert parse split compute validate "
        "rotate compare generate flatten search select max_of min_of is_valid get has encode decode"
    ).split(),
    "object": (
        "a list of numbers|a string|two lists|a dictionary|the prime numbers up to n|the vowels in a string|"
        "duplicates in a list|a list of words|a matrix|the largest element|a sorted list|the digits of a number|"
        "a sentence|a nested list|a date|brackets|the longest word|even numbers|a CSV file|a linked list|"
        "a binary tree|the most common element|pairs with a given sum"
    ).split("|"),
    "noun": (
        "words numbers digits vowels list string pairs primes matrix elements characters intervals brackets letters "
        "tokens items rows evens odds sequence substring palindromes grades prices file_names grid sum array triples"
    ).split(),
    "language": (
        "French Spanish German Italian Portuguese Dutch Polish Japanese Chinese Arabic Hindi Swedish Turkish"
    ).split(),
    "person": "sister brother mother father grandfather boss neighbour teacher colleague daughter son friend cousin".split(),
    "activity": (
        "learn to cook|save money|sleep better|learn the guitar|grow tomatoes|find a new job|make new friends|paint a room|"
        "write a novel|organise a birthday party|learn Spanish|lose weight|drink less coffee|fix a bicycle|bake bread|"
        "travel by train|take better photos|study for an exam|clean the house faster|learn to swim|spend less time online|"
        "give a presentation|move to a new city|write a letter of complaint|start a small business|meditate|"
        "teach my child to read|repair a chair|build a website|plan a wedding|eat more vegetables|learn to dance|"
        "camp in the rain|choose a laptop|ask for a raise|remember names|train for a marathon|sew a button|"
        "keep a diary|volunteer at a school"
    ).split("|"),
    "thing": (
        "microwave|bicycle|telescope|battery|volcano|submarine|piano|compass|windmill|camera|garden|dragon|clock|mirror|"
        "robot|whale|bridge|radio|map|violin|spider|balloon|printer|glacier|comet"
    ).split("|"),
    "topic": (
        "photosynthesis|the water cycle|democracy|inflation|machine learning|the Roman Empire|healthy eating|"
        "climate change|gravity|the immune system|renewable energy|the internet|a small village|the ocean|friendship|"
        "space travel|electric cars|music|working from home|ancient Egypt|vaccines|volcanoes|the stock market|chess|"
        "sleep|coffee|bees|the brain|urban gardens|autumn"
    ).split("|"),
}
_SLOT = re.compile(r"\{(n|name2|Topic|" + "|".join(_WORDS) + r")\}")


@dataclass(frozen=True, slots=True)
class Opener:
    category: str
    text: str


class Openers:
    """An endless, seeded supply of prompt beginnings: a category by its share, an opener of it, its slots filled."""

    def __init__(self, openers: Mapping[str, Sequence[str]], shares: Mapping[str, float], seed: int) -> None:
        self._openers, self._random = openers, random.Random(seed)
        self._names = [name for name in openers if shares.get(name, 0.0) > 0]
        self._weights = [shares[name] for name in self._names]
        assert self._names

    def draw(self) -> Opener:
        category = self._random.choices(self._names, self._weights)[0]
        return Opener(category, _SLOT.sub(self._word, self._random.choice(self._openers[category])))

    def _word(self, slot: re.Match[str]) -> str:
        kind = slot.group(1)
        if kind == "n":
            return str(
                self._random.choice(
                    (self._random.randint(2, 20), self._random.randint(2, 100), 5 * self._random.randint(2, 60))
                )
            )
        word = self._random.choice(_WORDS[kind.lower().rstrip("2")])
        return word[0].upper() + word[1:] if kind == "Topic" else word


def read_openers(path: Path) -> dict[str, list[str]]:
    """The user's own: one opener a line, `category<TAB>opener` or only the opener. `\\n` is a line break."""
    openers: dict[str, list[str]] = {}
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError("The seed prompts cannot be read.", f"{path}: {error}.", "Check --seed-prompts.") from error
    for line in filter(str.strip, lines):
        category, tab, text = line.partition("\t")
        name, opener = (category.strip(), text) if tab else ("other", line)
        openers.setdefault(name, []).append(opener.replace("\\n", "\n"))
    if not openers:
        raise TrainingError("The seed prompts are empty.", f"{path} has no line.", "Write one opener per line.")
    return openers


def parse_mix(text: str, categories: Sequence[str]) -> dict[str, float]:
    """`maths=3,code=2` to shares; categories not named get none. Raises `TrainingError`."""
    shares = {}
    for part in filter(None, text.split(",")):
        name, _, number = part.partition("=")
        try:
            shares[name.strip()] = float(number)
        except ValueError:
            shares[name.strip()] = -1.0
    if not shares or set(shares) - set(categories) or min(shares.values()) < 0 or not sum(shares.values()):
        raise TrainingError(
            "The mix cannot be used.",
            f"It is '{text}'.",
            f"Write name=share,… with names from: {', '.join(categories)}.",
        )
    return shares
