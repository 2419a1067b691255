"""Thoughts and words of reasoning models, as their templates and parsers leave them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.hosted.thoughts import split_thoughts

MARKS = [
    ("<think>", "</think>"),
    ("<THINK>", "</Think>"),
    ("<thinking>", "</thinking>"),
    ("< thought >", "< /thought >"),
    ("<seed:think>", "</seed:think>"),
    ("<analysis>", "</analysis>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|channel>thought", "<channel|>"),
    ("&lt;think&gt;", "&lt;/think&gt;"),
    ("<scratchpad>", "</scratchpad>"),
    ("<antThinking>", "</antThinking>"),
    ('<details type="reasoning" done="true" duration="5">', "</details>"),
    ("<details open type='reasoning'>", "</details>"),
    ("&lt;details type=&quot;reasoning&quot; done=&quot;true&quot;&gt;", "&lt;/details&gt;"),
]
BLOCKS = [marks for marks in MARKS if "details" not in marks[1]]
"""Marks of which the closing one says alone that thoughts are before it."""
REPLIES = [
    ("It is red.", "", "It is red."),
    ("  It is red.\n", "", "  It is red.\n"),  # without thoughts a text is left as it is
    ("", "", ""),
    ("<think>\n\n</think>\n\nYes", "", "Yes"),  # thinking switched off
    ("<think>\n<think>\nno or yes</think>\nYes", "<think>\nno or yes", "Yes"),  # the template's mark, and the model's
    ("no? </think> still no? </think> Yes", "no?  still no?", "Yes"),
    ("Yes.\n<think>or no</think>\nBecause.", "or no", "Yes.\n\nBecause."),
    ("Yes.\n<think>or", "or", "Yes."),
    ("<think>or", "or", ""),
    ("It is red.</think>", "It is red.", ""),
    ("The sign says <think> in red.", "", "The sign says <think> in red."),
    ("I think </b> yes <thinker>", "", "I think </b> yes <thinker>"),
    (
        "<|channel|>analysis<|message|>or no<|end|><|start|>assistant<|channel|>final<|message|>Yes<|return|>",
        "or no<|end|><|start|>assistant",
        "Yes",
    ),
    ("analysisor noassistantfinalYes", "or no", "Yes"),
    (
        "<|channel|>analysis<|message|>no?<|channel|>final <|constrain|>JSON<|message|>{}<|return|>",
        "no?",
        "{}",
    ),
    ("<|channel|>final<|message|>Yes<|return|>", "", "Yes"),
    ("<|channel|>analysis<|message|>or no", "<|message|>or no", ""),  # cut off
    ("assistantfinal", "", "assistantfinal"),
    ("<|START_THINKING|>or no<|END_THINKING|><|START_RESPONSE|>Yes<|END_RESPONSE|>", "or no", "Yes"),
    ("<|START_RESPONSE|>Yes<|END_RESPONSE|>", "", "Yes"),
    ("Here is my thought process:\nor no\nHere is my response:\nYes", "or no", "Yes"),
    ('The sign says "<think>" and `</think>`.', "", 'The sign says "<think>" and `</think>`.'),
    (r'{"answer": "It says \"</think>\"."}', "", r'{"answer": "It says \"</think>\"."}'),
    ("<think>I close with `</think>`.</think>Yes", "I close with `</think>`.", "Yes"),
    ("analysis of the final answer: Yes", "", "analysis of the final answer: Yes"),
    # Around the words.
    ("<think>or no</think>\n<answer>\nYes\n</answer>", "or no", "Yes"),
    ("<think>or no</think><answer>Yes", "or no", "Yes"),
    ("or no</think>\n\n<response>Yes</response>", "or no", "Yes"),
    ("<answer>Yes</answer>", "", "<answer>Yes</answer>"),  # without thoughts, what somebody asked for
    ("<think>or no</think><|begin_of_box|>Yes<|end_of_box|>", "or no", "Yes"),
    ("<|begin_of_box|>Yes<|end_of_box|>", "", "Yes"),
    ("<|begin_of_thought|>or no<|end_of_thought|>\n<|begin_of_solution|>Yes<|end_of_solution|>", "or no", "Yes"),
    # Other forms of a whole reply, also cut off.
    ("Here are my reasoning steps:\nor no\n[BEGIN FINAL RESPONSE]\nYes\n[END FINAL RESPONSE]<|end|>", "or no", "Yes"),
    ("Here are my reasoning steps:\nor no", "or no", ""),
    (
        "<SUMMARY>I look.</SUMMARY> <CAPTION>A</CAPTION> <REASONING>or no</REASONING> <CONCLUSION>Yes</CONCLUSION>",
        "I look.</SUMMARY> <CAPTION>A</CAPTION> <REASONING>or no</REASONING>",
        "Yes",
    ),
    ("<SUMMARY>I look.</SUMMARY>\n<CAPTION>A", "I look.</SUMMARY>\n<CAPTION>A", ""),
    ("<summary>It is red.</summary>", "", "<summary>It is red.</summary>"),
    ("Thinking...\nor no\n...done thinking.\n\nYes", "or no", "Yes"),
    ("*Thinking...*\n\n> **Look**\n> or no\n\nYes, it is > 3.", "> **Look**\n> or no", "Yes, it is > 3."),
    ("Thinking... of what to wear.", "", "Thinking... of what to wear."),
    (":::thinking\nor no\n:::\n\nYes", "or no", "Yes"),
    ("```thinking\nor no\n```\nYes", "or no", "Yes"),
    # Open WebUI's, and other details.
    (
        '<details type="reasoning" done="true">\n<summary>Thought for 2 seconds</summary>\n> or no\n</details>\nYes',
        "<summary>Thought for 2 seconds</summary>\n> or no",
        "Yes",
    ),
    (
        '<details type="reasoning" done="false">\n<summary>Thinking…</summary>\n> or',
        "<summary>Thinking…</summary>\n> or",
        "",
    ),
    ("<details><summary>More</summary>red</details>", "", "<details><summary>More</summary>red</details>"),
    ("It has <details> and </details>.", "", "It has <details> and </details>."),
    ('<details type="code">1</details> Yes', "", '<details type="code">1</details> Yes'),
    # Texts about marks, and quotation marks that are not around one.
    ("The page shows <think> and </think> tags.", "", "The page shows <think> and </think> tags."),
    ("It says (<think>) in `[THINK]`.", "", "It says (<think>) in `[THINK]`."),
    ("Yes <think>or no</think> Because.", "or no", "Yes  Because."),
    ('<think>It says "red"</think>"Red"', 'It says "red"', '"Red"'),
]
texts = st.text(st.characters(exclude_characters="<[◁"), max_size=30).filter(lambda text: text == text.strip())


@pytest.mark.parametrize(("reply", "thoughts", "words"), REPLIES)
def test_replies(reply, thoughts, words):
    assert split_thoughts(reply) == (thoughts, words)


@given(st.sampled_from(MARKS), texts, texts, texts)
def test_marks(marks, one, other, words):
    """One block, without its opening mark too; two blocks; one that was cut off. No thought is left among the words."""
    first, last = marks
    assert split_thoughts(f"{first}{one}{last}{words}") == (one, words)
    assert split_thoughts(f"{one}\n{last}\n{words}") == (one, words) or marks not in BLOCKS
    assert split_thoughts(f"{first}{one}{last}{first}{other}{last}{words}") == (f"{one}{other}".strip(), words)
    assert split_thoughts(f"{words}\n{first}{one}") == (one, words)
    assert split_thoughts(f"{one}{last}{other}{last}{words}")[1] == words or marks not in BLOCKS


@given(st.lists(st.sampled_from([*(mark for pair in MARKS for mark in pair), "a", "\n", "analysis", "assistantfinal"])))
def test_words_have_no_more_thoughts(pieces):
    """And nothing is lost, whatever the order of marks."""
    text = "".join(pieces)
    thoughts, words = split_thoughts(text)
    assert sum(part.count("a") for part in (thoughts, words)) <= text.count("a")
    assert split_thoughts(words)[1] == words
