"""CHAIR against a table of captions and the official rule's classes, and sums written out by hand.

The table was made with nltk's own tokenizers (Punkt with its English data) and pattern's singular rules beside the official
word lists, outside of this repository; the classes of each line were then checked by eye.
"""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from reverie_jax.data.row_files import Rows
from reverie_jax.eval.benchmarks import find_benchmark
from tests.eval.benchmarks import makers_free as make

# What a caption mentions: classes, each as often as there is a mention.
MENTIONS = {
    # Singulars lose their s: "bus" becomes "bu", which is nothing; "buses" is the one way to say it.
    "A bus is parked on the road.": [],
    "Two buses are parked near a minibus and an airbus.": ["bus"],
    "Several minibuses and airbuses wait.": ["bus", "airplane"],
    "A trolley passes by, then two trolleys.": ["bus"] * 2,
    "The grass is tall near the tennis court.": [],
    "A player swings a tennis racket.": ["person", "tennis racket"],
    "Two rackets and a tennis ball lie on the court.": ["tennis racket", "sports ball"],
    "A sports ball rolls past a baseball.": ["sports ball"],
    "A wine glass and two wine glasses and a glass.": ["wine glass"] * 2,
    # Plurals that pattern knows, and those that it gets wrong.
    "Three men and two women talk to people.": ["person"] * 3,
    "The policemen help some children.": ["person"] * 2,
    "A person person persons people peoples.": ["person"] * 5,
    "A thief and two thieves with knives.": ["person", "knife"],
    "Two canoes and a canoe.": ["boat"],
    "Collies and doggies, puppies and ponies.": ["dog", "horse"],
    "He wears bow ties and ties.": ["tie"],
    "Calves, oxen, an ox, geese, sheep, mice and bison.": ["cow"] * 4 + ["bird", "sheep", "mouse"],
    "Scissors, skis, a ski and luggage.": ["scissors", "skis", "skis", "suitcase"],
    "Two taxis, three suvs and limos.": ["car"] * 3,
    "Shelves of books and stoves, gloves and a baseball glove.": ["book", "oven", "baseball glove"],
    "A toothbrush, two toothbrushes, benches, couches and sandwiches.": ["toothbrush"] * 2
    + ["bench", "couch", "sandwich"],
    "Two vases and purses.": ["vase", "handbag"],
    "A skier is skiing on skis.": ["person", "skis"],
    # Two words, from left to right.
    "She uses a hair drier, a hairdryer and a hair dryer.": ["hair drier"] * 2,
    "Three hot dogs and a dog.": ["hot dog", "dog"],
    "A hot dog bun.": ["hot dog"],
    "He wears a bow tie.": ["tie"],
    "A tie and a bow.": ["tie"] * 2,
    "Suit cases and a suitcase.": ["suitcase"] * 2,
    "Two baseball gloves and three baseball bats with home plate.": ["baseball glove", "baseball bat"],
    "Traffic lights, a stop sign, fire hydrants, parking meters and street lights.": ["traffic light"] * 2
    + ["stop sign", "fire hydrant", "parking meter"],
    "A teddy bear and a bear.": ["teddy bear", "bear"],
    "Teddy bears by a laptop computer.": ["teddy bear", "laptop"],
    "A potted plant and potted plants and a plant.": ["potted plant"] * 2,
    "A dining table, a table and a desk.": ["dining table"] * 3,
    "Cell phones and mobile phones and telephones.": ["cell phone"] * 3,
    "He rides a motor cycle beside a motorbike.": ["motorcycle"] * 2,
    "The train track is empty.": [],
    "A train on the tracks.": ["train"],
    "The remote control lies by the computer mouse.": ["remote", "laptop", "mouse"],
    "A stove top oven.": ["oven"] * 2,
    # Slips of the official list: a space before the word, a capital.
    "He rides a motor bike.": [],
    "A cheesecake and a cupcake.": ["cake"],
    "An iPhone and an iphone and a smartphone.": ["cell phone"],
    # Toilet seats, jets, young animals.
    "A toilet seat is up.": ["toilet"],
    "The seat of the toilet is up and the other seats are down.": ["toilet"],
    "A baby and a toilet. Take a seat.": ["person", "toilet"],
    "A toilet with a lid and a chair.": ["toilet", "chair"],
    "Take a seat.": ["chair"],
    "Two jets and a passenger jet fly over a passenger train.": ["airplane"] * 2 + ["train"],
    "A passenger waits for the train.": ["person", "train"],
    "A baby elephant with an adult elephant and a baby.": ["elephant"] * 2 + ["person"],
    "Baby birds and baby animals and bear cubs.": ["bird", "bear"],
    "A baby cub.": [],
    "A baby toy bear.": ["person", "bear"],
    "An adult holds a baby giraffe.": ["person", "giraffe"],
    # Colours and other senses fire all the same.
    "An orange shirt and a mouse near the remote.": ["orange", "mouse", "remote"],
    # Compounds stay one word.
    "A man/woman and a cat/dog.": [],
    "A dog-cat sits beside a cat-dog.": [],
    "A ship and a spaceship.": ["boat"],
    # Case, possessives, contractions, quotes, brackets, numbers.
    "The DOG and The Cat. A TV.": ["dog", "cat", "tv"],
    "A dog's bowl and the dogs' bowls.": ["dog", "dog", "bowl", "bowl"],
    "The dog’s bowl and “a cat”.": ["dog", "bowl", "cat"],
    "It's a dog that isn't a cat; there're cows and they've horses.": ["dog", "cat", "cow", "horse"],
    'A sign says "dog" and (cat) and [horse].': ["dog", "cat", "horse"],
    'She said "a dog." Then a cat came.': ["dog", "cat"],
    "He saw a dog (and a cat.) The horse ran.": ["dog", "cat", "horse"],
    "<dog> {cat}": ["dog", "cat"],
    "2 dogs, 3 cats and 10 horses.": ["dog", "cat", "horse"],
    "1. A dog. 2. A cat. 3. A horse.": ["dog", "cat", "horse"],
    "*dog* **cat** _horse_ `cow`": ["dog", "cat", "cow"],
    "#dog @cat $horse 50%cow": ["dog", "cat", "horse", "cow"],
    # A full stop ends a sentence in mid text, but not where no space follows.
    "There is a dog. There is a cat. There are cows.": ["dog", "cat", "cow"],
    "a dog . a cat .": ["dog", "cat"],
    "A dog.A cat.": ["cat"],
    "A dog... and a cat.": ["dog", "cat"],
    "A dog at 5 p.m. near a cat. Mr. Smith rides a horse.": ["dog", "cat", "horse"],
    "The dog! Is it a cat? Yes, a horse; a sheep: a cow, a zebra.": ["dog", "cat", "horse", "sheep", "cow", "zebra"],
    "A dog,a cat;a horse:a cow&a zebra.": ["dog", "cat", "horse", "cow", "zebra"],
    "A dog--a cat.": ["dog", "cat"],
    "A dog\nand a cat\n\nand a horse.": ["dog", "cat", "horse"],
    "A dog.\nA cat.\n- A horse": ["dog", "cat", "horse"],
    "A dog\tand a cat.": ["dog", "cat"],
    # Other languages, and nothing at all.
    "Un chien et un chat.": [],
    "Ein Hund sitzt im Auto.": [],
    "猫と犬がいます。": [],
    "A café table with a piñata and a dog.": ["dining table", "dog"],
    "Nothing of the kind is here.": [],
    "": [],
    " . ": [],
}

EMPTY, ZEBRA = 81, 82


@pytest.fixture(scope="module")
def chair():
    return find_benchmark("chair")


@pytest.fixture(scope="module")
def lacking(chair, tmp_path_factory):
    """Image k holds all of COCO but its k-th class; one image holds nothing, and one a zebra."""
    images = {k: ([name for name in make.COCO if name != lost], ["So it is."]) for k, lost in enumerate(make.COCO, 1)}
    images |= {EMPTY: ([], ["So it is."]), ZEBRA: (["zebra"], ["So it is."])}
    return chair.load(make.coco(tmp_path_factory.mktemp("coco"), images))


def asked(loaded):
    """Question by image id."""
    return {int(question.image[-16:-4]): question for question in loaded.questions}


def mentions(chair, loaded, caption: str, classes) -> Counter:
    """How often a caption mentions each class, from the published numbers alone."""
    of = asked(loaded)
    wanted = [make.COCO.index(name) + 1 for name in classes]
    shown = [*wanted, EMPTY]
    answers = {str(of[image].id): caption for image in shown} | {str(of[ZEBRA].id): "A zebra."}
    scored = chair.score(loaded, {str(q.id): answers.get(str(q.id), "") for q in loaded.questions})
    row = dict(zip(scored.clusters, scored.counts, strict=True))

    def invented(image: int) -> float:
        return make.value(scored, "CHAIRi", sums=row[of[image].cluster]) / 100

    # One true mention beside n false ones: their share is n / (n + 1).
    share = make.value(scored, "CHAIRi", sums=row[of[EMPTY].cluster] + row[of[ZEBRA].cluster]) / 100
    total = share / (1 - share)
    found = {name: round(invented(image) * total, 6) for name, image in zip(classes, wanted, strict=True)}
    return Counter({"all": round(total, 6), **found})


@pytest.mark.parametrize("caption", MENTIONS, ids=lambda caption: caption[:40])
def test_caption_mentions_what_the_official_rule_finds(chair, lacking, caption):
    wanted = Counter(MENTIONS[caption])
    assert mentions(chair, lacking, caption, list(wanted)) == Counter({"all": wanted.total(), **wanted})


def test_every_class_is_found_by_its_name(chair, lacking):
    """The 80 names themselves, but for the one that the rule can never find."""
    names = [name for name in make.COCO if name not in ("toilet", "bus")]
    text = " ".join(f"There is a {name} here." for name in names)
    assert mentions(chair, lacking, text, names) == Counter({"all": 78, **Counter(names)})
    assert mentions(chair, lacking, "A toilet and a bus.", ["toilet", "bus"]) == Counter(all=1, toilet=1, bus=0)


IMAGES = {
    # Segments, captions: the truth is both together.
    101: (["dog", "dog"], ["A man walks.", "People stand on the grass."]),
    102: (["cat", "couch"], ["A kitten sleeps on a sofa."]),
    103: ([], ["Two buses on a road."]),
    104: (["bus"], ["A bus."]),
    105: ([], ["Nothing much."]),
}
TRUTH = {101: {"dog", "person"}, 102: {"cat", "couch"}, 103: {"bus"}, 104: {"bus"}, 105: set()}
SAID = {
    101: ("A dog, a dog and a puppy with a cat and a cat.", ["dog"] * 3 + ["cat"] * 2),
    102: ("A tabby on a settee near a table.", ["cat", "couch", "dining table"]),
    103: ("Buses and buses and a truck.", ["bus", "bus", "truck"]),
    104: ("A bus.", []),
    105: ("A fine view.", []),
}


@pytest.fixture
def small(chair, tmp_path):
    return chair.load(make.coco(tmp_path, IMAGES))


def answers(loaded, said):
    return {str(question.id): said[image][0] for image, question in asked(loaded).items()}


def by_hand(said, images) -> dict[str, float]:
    """CHAIRi micro over the corpus with repeats, CHAIRs over all captions, recall of distinct classes."""
    invented = mentioned = bad = found = true = 0
    for image in images:
        words = said[image][1]
        wrong = [word for word in words if word not in TRUTH[image]]
        invented, mentioned, bad = invented + len(wrong), mentioned + len(words), bad + bool(wrong)
        found, true = found + len(set(words) & TRUTH[image]), true + len(TRUTH[image])
    return {
        "CHAIRs": 100 * bad / len(images),
        "CHAIRi": 100 * invented / mentioned if mentioned else 0.0,
        "recall": 100 * found / true if true else 0.0,
    }


def test_scores_are_micro_over_mentions_and_over_all_captions(chair, small):
    scored = chair.score(small, answers(small, SAID))
    wanted = by_hand(SAID, list(SAID))
    assert wanted["CHAIRi"] == pytest.approx(100 * 4 / 11)  # and not the mean of the captions' shares
    assert wanted["CHAIRs"] == pytest.approx(100 * 3 / 5)
    for name, number in wanted.items():
        assert make.value(scored, name) == pytest.approx(number), name
    assert make.headline(scored) == pytest.approx(wanted["CHAIRs"])
    make.sound(small, scored)


def test_any_images_sums_are_their_own_score(chair, small):
    scored = chair.score(small, answers(small, SAID))
    cluster = {image: scored.clusters.index(question.cluster) for image, question in asked(small).items()}
    rng = np.random.default_rng(0)
    for _ in range(20):
        images = [image for image in SAID if rng.random() < 0.5] or [101]
        sums = scored.counts[[cluster[image] for image in images]].sum(0)
        for name, number in by_hand(SAID, images).items():
            assert make.value(scored, name, sums=sums) == pytest.approx(number), (name, images)


def test_caption_without_a_mention_is_clean(chair, small):
    scored = chair.score(small, answers(small, {image: ("So it is.", []) for image in SAID}))
    assert make.value(scored, "CHAIRs") == 0
    assert make.value(scored, "CHAIRi") == 0  # upstream divides by zero
    assert make.value(scored, "recall") == 0
    make.sound(small, scored)


def test_words_of_one_class_count_apart(chair, small):
    said = {**{image: ("Nothing.", []) for image in SAID}, 105: ("A bride and a groom and a man.", ["person"] * 3)}
    said[102] = ("A cat.", ["cat"])
    scored = chair.score(small, answers(small, said))
    assert make.value(scored, "CHAIRi") == pytest.approx(75)
    assert make.value(scored, "CHAIRs") == pytest.approx(20)


def test_a_missing_caption_mentions_nothing(chair, small):
    some = answers(small, SAID)
    del some[str(asked(small)[101].id)]
    scored = chair.score(small, some)
    assert np.isfinite(list(scored.values().values())).all()
    assert make.value(scored, "CHAIRi") == pytest.approx(by_hand({**SAID, 101: ("", [])}, list(SAID))["CHAIRi"])


def test_the_training_splits_truth_is_its_own(chair, tmp_path):
    """What stands in train2014's files is no truth of val2014's images."""
    loaded = chair.load(make.coco(tmp_path, {101: (["dog"], ["A dog."])}))
    said = {str(q.id): "A kite." for q in loaded.questions}
    scored = chair.score(loaded, said)
    cluster = scored.clusters.index(asked(loaded)[101].cluster)
    assert make.value(scored, "CHAIRs", sums=scored.counts[cluster]) == 100


def test_questions_ask_for_a_detailed_description(small):
    assert {question.text for question in small.questions} == {"Please describe this image in detail."}
    assert {question.image for question in small.questions} >= {make.coco_name(image) for image in IMAGES}


def test_pictures_are_read_by_their_name(chair, tmp_path):
    loaded = chair.load(make.coco(tmp_path, IMAGES))
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / make.coco_name(101)).write_bytes(make.PICTURE)
    assert loaded.read_image(asked(loaded)[101].image) == make.PICTURE
    with pytest.raises(make.BenchmarkError):
        loaded.read_image(asked(loaded)[102].image)


def test_captions_are_written_as_the_official_script_reads_them(chair, small, tmp_path):
    (path,) = chair.export(small, answers(small, SAID), tmp_path / "out")
    made = json.loads(path.read_text("utf-8"))
    language = {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "CIDEr", "SPICE", "ROUGE_L"}
    assert set(made["overall"]) >= language
    rows = {row["image_id"]: row for row in made["imgToEval"].values()}
    assert {image: row["caption"] for image, row in rows.items()} == {image: text for image, (text, _) in SAID.items()}
    assert all(set(row) >= language for row in rows.values())
    found = [row for member in Rows(path) for row in chair.split_row(member)]
    assert {chair.match_question(row, small): chair.answer_text(row) for row in found} == answers(small, SAID)


@pytest.mark.parametrize("lost", ["instances_val2014.json", "captions_val2014.json"])
def test_a_missing_file_is_named(chair, tmp_path, lost):
    folder = make.coco(tmp_path, IMAGES)
    (folder / lost).unlink()
    make.refused(chair, folder, lost.split("_")[0])


@pytest.mark.parametrize("broken", ["instances_val2014.json", "captions_val2014.json"])
@pytest.mark.parametrize(
    ("text", "said"),
    [("{", ""), ("[]", ""), ('{"annotations": 3}', ""), ("\xff", "")],
    ids=["cut off", "a list", "no rows", "no text"],
)
def test_a_broken_file_is_named(chair, tmp_path, broken, text, said):
    folder = make.coco(tmp_path, IMAGES)
    (folder / broken).write_bytes(text.encode("latin1"))
    make.refused(chair, folder, broken, said)


@pytest.mark.parametrize("lost", ["image_id", "category_id"])
def test_a_broken_annotation_is_named(chair, tmp_path, lost):
    folder = make.coco(tmp_path, IMAGES)
    path = folder / "instances_val2014.json"
    whole = json.loads(path.read_text())
    del whole["annotations"][1][lost]
    make.dump(path, whole)
    make.refused(chair, folder, path.name, "1")


def test_an_unknown_category_is_named(chair, tmp_path):
    folder = make.coco(tmp_path, IMAGES)
    path = folder / "instances_val2014.json"
    whole = json.loads(path.read_text())
    whole["annotations"][0]["category_id"] = 777
    make.dump(path, whole)
    make.refused(chair, folder, path.name, "777")


def test_a_caption_without_text_is_named(chair, tmp_path):
    folder = make.coco(tmp_path, IMAGES)
    path = folder / "captions_val2014.json"
    whole = json.loads(path.read_text())
    whole["annotations"][2]["caption"] = None
    make.dump(path, whole)
    make.refused(chair, folder, path.name)
