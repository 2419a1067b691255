"""Words of COCO's 80 classes, and CHAIR's method of finding them in a caption (Rohrbach et al., arXiv 1809.02156).

Sources of the tables: `data/synonyms.txt` and the phrases in `utils/chair.py` of LisaAnne/Hallucination (quirks kept: two
words with a leading space and one capital never match); what RLHF-V's `eval/data/synonyms_refine.txt` adds; abbreviations of
Punkt's English model (Kiss & Strunk 2006), as NLTK has it.

Nothing is downloaded. NLTK's word splitter needs no data, TextBlob carries a sibling of `pattern.en`'s singularizer, and of
Punkt's model only the abbreviations say whether a full stop stays with its word where all is lower case.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

SYNONYMS = (
    (
        "person, girl, boy, man, woman, kid, child, chef, baker, people, adult, rider, children, baby, worker"
        ", passenger, sister, biker, policeman, cop, officer, lady, cowboy, bride, groom, male, female, guy"
        ", traveler, mother, father, gentleman, pitcher, player, skier, snowboarder, skater, skateboarder"
        ", person, woman, guy, foreigner, child, gentleman, caller, offender, coworker, trespasser, patient"
        ", politician, soldier, grandchild, serviceman, walker, drinker, doctor, bicyclist, thief, buyer"
        ", teenager, student, camper, driver, solider, hunter, shopper, villager"
    ),
    "bicycle, bike, bicycle, bike, unicycle, minibike, trike",
    "car, automobile, van, minivan, sedan, suv, hatchback, cab, jeep, coupe, taxicab, limo, taxi",
    "motorcycle, scooter,  motor bike, motor cycle, motorbike, scooter, moped",
    "airplane, jetliner, plane, air plane, monoplane, aircraft, jet, jetliner, airbus, biplane, seaplane",
    "bus, minibus, trolley",
    "train, locomotive, tramway, caboose",
    "truck, pickup, lorry, hauler, firetruck",
    (
        "boat, ship, liner, sailboat, motorboat, dinghy, powerboat, speedboat, canoe, skiff, yacht, kayak"
        ", catamaran, pontoon, houseboat, vessel, rowboat, trawler, ferryboat, watercraft, tugboat, schooner"
        ", barge, ferry, sailboard, paddleboat, lifeboat, freighter, steamboat, riverboat, battleship"
        ", steamship"
    ),
    "traffic light, street light, traffic signal, stop light, streetlight, stoplight",
    "fire hydrant, hydrant",
    "stop sign",
    "parking meter",
    "bench, pew",
    (
        "bird, ostrich, owl, seagull, goose, duck, parakeet, falcon, robin, pelican, waterfowl, heron"
        ", hummingbird, mallard, finch, pigeon, sparrow, seabird, osprey, blackbird, fowl, shorebird"
        ", woodpecker, egret, chickadee, quail, bluebird, kingfisher, buzzard, willet, gull, swan, bluejay"
        ", flamingo, cormorant, parrot, loon, gosling, waterbird, pheasant, rooster, sandpiper, crow, raven"
        ", turkey, oriole, cowbird, warbler, magpie, peacock, cockatiel, lorikeet, puffin, vulture, condor"
        ", macaw, peafowl, cockatoo, songbird"
    ),
    "cat, kitten, feline, tabby",
    (
        "dog, puppy, beagle, pup, chihuahua, schnauzer, dachshund, rottweiler, canine, pitbull, collie, pug"
        ", terrier, poodle, labrador, doggie, doberman, mutt, doggy, spaniel, bulldog, sheepdog, weimaraner"
        ", corgi, cocker, greyhound, retriever, brindle, hound, whippet, husky"
    ),
    ("horse, colt, pony, racehorse, stallion, equine, mare, foal, palomino, mustang, clydesdale, bronc, bronco"),
    "sheep, lamb, ram, lamb, goat, ewe",
    "cow, cattle, oxen, ox, calf, cattle, holstein, heifer, buffalo, bull, zebu, bison",
    "elephant",
    "bear, panda",
    "zebra",
    "giraffe",
    "backpack, knapsack",
    "umbrella",
    "handbag, wallet, purse, briefcase",
    "tie, bow, bow tie",
    "suitcase, suit case, luggage",
    "frisbee",
    "skis, ski",
    "snowboard",
    "sports ball, ball",
    "kite",
    "baseball bat",
    "baseball glove",
    "skateboard",
    "surfboard, longboard, skimboard, shortboard, wakeboard",
    "tennis racket, racket",
    "bottle",
    "wine glass",
    "cup",
    "fork",
    "knife, pocketknife, knive",
    "spoon",
    "bowl, container",
    "banana",
    "apple",
    "sandwich, burger, sub, cheeseburger, hamburger",
    "orange",
    "broccoli",
    "carrot",
    "hot dog",
    "pizza",
    "donut, doughnut, bagel",
    "cake,  cheesecake, cupcake, shortcake, coffeecake, pancake",
    "chair, seat, stool",
    "couch, sofa, recliner, futon, loveseat, settee, chesterfield",
    "potted plant, houseplant",
    "bed",
    "dining table, table, desk",
    "toilet, urinal, commode, toilet, lavatory, potty",
    "tv, monitor, televison, television",
    "laptop, computer, notebook, netbook, lenovo, macbook, laptop computer",
    "mouse",
    "remote",
    "keyboard",
    "cell phone, mobile phone, phone, cellphone, telephone, phon, smartphone, iPhone",
    "microwave",
    "oven, stovetop, stove, stove top oven",
    "toaster",
    "sink",
    "refrigerator, fridge, fridge, freezer",
    "book",
    "clock",
    "vase",
    "scissors",
    "teddy bear, teddybear",
    "hair drier, hairdryer",
    "toothbrush",
)
"""One class per row, its own name first: 416 entries, 403 of them distinct."""

PHRASES = (
    *("motor bike", "motor cycle", "air plane", "traffic light", "street light", "traffic signal", "stop light"),
    *("fire hydrant", "stop sign", "parking meter", "suit case", "sports ball", "baseball bat", "baseball glove"),
    *("tennis racket", "wine glass", "hot dog", "cell phone", "mobile phone", "teddy bear", "hair drier"),
    *("potted plant", "bow tie", "laptop computer", "stove top oven", "home plate", "train track"),
)
"""Phrases that count as one word. "home plate" and "train track" are not objects, but keep "train" from counting."""

_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
_VEHICLES = ("jet", "train")

_MORE = {"person": ("brother", "pedestrian"), "dining table": ("coffee table",), "remote": ("remote control",)}
"""Synonyms that Object HalBench adds to CHAIR's."""

_ABBREVIATIONS = (
    "a.a a.c a.d a.g a.h a.m a.m.e a.s a.t adm ala ariz aug ave b.f b.v bros c c.i.t c.o.m.b c.v calif chg cie co "
    "col colo conn corp cos ct d d.c d.h d.w dec dr e e.f e.h e.l e.m f f.g f.j feb fla fri ft g g.d g.f g.k ga "
    "gen h h.c h.f h.m i.m.s ill inc j.b j.c j.j j.k j.p j.r jan jr k kan ky l l.a l.f l.p lt ltd m m.b.a m.d.c "
    "m.j maj messrs mg mich minn mr mrs ms n n.c n.d n.h n.j n.m n.v n.y nev nov oct ok okla ore p p.a.m p.m pa "
    "ph.d prof r r.a r.h r.i r.j r.k r.t rep reps s s.a s.a.y s.c s.g s.p.a s.s sen sep sept sr st sw t t.j tenn "
    "tues u.k u.n u.s u.s.a u.s.s.r v va vs vt w w.c w.r w.va w.w wash wed wis yr"
)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Words of objects with their classes.

    Attributes:
        classes: by word.
        merged: pairs of words that count as one word, with that word.
    """

    classes: Mapping[str, str]
    merged: Mapping[str, str]

    def merge(self, words: Sequence[str], *, alone: bool = True) -> list[str]:
        """Return words with pairs merged, from left to right.

        Args:
            words: of a caption.
            alone: keeps words that are not in a pair.
        """
        merged, at = [], 0
        while at < len(words):
            pair = " ".join(words[at : at + 2])
            if pair in self.merged:
                merged.append(self.merged[pair])
                at += 2
            else:
                merged += [words[at]] if alone else []
                at += 1
        return merged

    def objects(self, words: Sequence[str]) -> list[tuple[str, str]]:
        """Return the words that are objects, with their classes, repeats included. The seat of a toilet is not a chair."""
        if "toilet" in words and "seat" in words:
            words = [word for word in words if word != "seat"]
        return [(word, self.classes[word]) for word in words if word in self.classes]

    def mentions(self, caption: str, lemma: Callable[[str], str] | None = None) -> list[tuple[str, str]]:
        """Return the objects that a caption mentions, with their classes, repeats included.

        Args:
            caption: to search.
            lemma: returns the lemma of a word; CHAIR's singularizer if None.
        """
        return self.objects(self.merge([(lemma or singular)(word) for word in split(caption)]))


def _merged(phrases: Sequence[str]) -> dict[str, str]:
    """Return pairs and their words: "baby" or "adult" before an animal, "passenger" before a vehicle are not persons."""
    return {
        **{phrase: phrase for phrase in phrases},
        **{f"{age} {animal}": animal for animal in _ANIMALS for age in ("baby", "adult")},
        **{f"passenger {vehicle}": vehicle for vehicle in _VEHICLES},
        "bow tie": "tie",
        "toilet seat": "toilet",
        "wine glas": "wine glass",  # as the singularizer writes it
    }


@functools.cache
def chair() -> Vocabulary:
    """Return CHAIR's vocabulary."""
    rows = [row.split(", ") for row in SYNONYMS]
    return Vocabulary({word: row[0] for row in rows for word in row}, _merged(PHRASES))


@functools.cache
def refined() -> Vocabulary:
    """Return Object HalBench's: no stray spaces, a few more words, and every synonym of several words is a phrase."""
    rows = [[word.strip() for word in row.split(", ")] for row in SYNONYMS]
    classes = {word: row[0] for row in rows for word in [*row, *_MORE.get(row[0], ())]}
    return Vocabulary(classes, _merged([*(word for word in classes if " " in word), "home plate", "train track"]))


@functools.cache
def singular(word: str) -> str:
    """Singularize as `pattern.en`, for words that may become objects. Its slips are kept: "bus" becomes "bu"."""
    # TextBlob differs here: Pattern leaves these unchanged, and keeps the front of "minibuses".
    if word.endswith(("collies", "doggies")):
        return word
    if word.endswith("buses"):
        return word.removesuffix("es")
    from textblob.en.inflect import singularize  # imports NLTK, which takes a second

    return str(singularize(word))


@functools.cache
def _splitters() -> tuple[Callable[[str], list[str]], Callable[[str], list[str]]]:
    """Return splitters of text into sentences, and of a sentence into words."""
    from nltk.tokenize.destructive import NLTKWordTokenizer
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    parameters = PunktParameters()
    parameters.abbrev_types = set(_ABBREVIATIONS.split())
    return PunktSentenceTokenizer(parameters).tokenize, NLTKWordTokenizer().tokenize


def split(caption: str) -> list[str]:
    """Split a caption into words in lower case, as `nltk.word_tokenize`.

    Only the last full stop of a sentence is split off its word.
    """
    sentences, words = _splitters()
    return [word for sentence in sentences(caption.lower()) for word in words(sentence)]
