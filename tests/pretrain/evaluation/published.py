"""Small files in the exact formats in which LAMBADA, BLiMP and the Children's Book Test are published."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = tuple("river house letter morning captain water window garden stone bread winter street lamp story".split())  # noqa: SIM905
SETS = ("adjunct_island", "wh_island", "npi_present_1")
ALL_SETS = tuple(
    """
    adjunct_island anaphor_gender_agreement anaphor_number_agreement animate_subject_passive
    animate_subject_trans causative complex_NP_island coordinate_structure_constraint_complex_left_branch
    coordinate_structure_constraint_object_extraction determiner_noun_agreement_1 determiner_noun_agreement_2
    determiner_noun_agreement_irregular_1 determiner_noun_agreement_irregular_2
    determiner_noun_agreement_with_adj_2 determiner_noun_agreement_with_adj_irregular_1
    determiner_noun_agreement_with_adj_irregular_2 determiner_noun_agreement_with_adjective_1
    distractor_agreement_relational_noun distractor_agreement_relative_clause drop_argument ellipsis_n_bar_1
    ellipsis_n_bar_2 existential_there_object_raising existential_there_quantifiers_1
    existential_there_quantifiers_2 existential_there_subject_raising expletive_it_object_raising inchoative
    intransitive irregular_past_participle_adjectives irregular_past_participle_verbs
    irregular_plural_subject_verb_agreement_1 irregular_plural_subject_verb_agreement_2
    left_branch_island_echo_question left_branch_island_simple_question matrix_question_npi_licensor_present
    npi_present_1 npi_present_2 only_npi_licensor_present only_npi_scope passive_1 passive_2
    principle_A_c_command principle_A_case_1 principle_A_case_2 principle_A_domain_1 principle_A_domain_2
    principle_A_domain_3 principle_A_reconstruction regular_plural_subject_verb_agreement_1
    regular_plural_subject_verb_agreement_2 sentential_negation_npi_licensor_present
    sentential_negation_npi_scope sentential_subject_island superlative_quantifiers_1 superlative_quantifiers_2
    tough_vs_raising_1 tough_vs_raising_2 transitive wh_island wh_questions_object_gap wh_questions_subject_gap
    wh_questions_subject_gap_long_distance wh_vs_that_no_gap wh_vs_that_no_gap_long_distance wh_vs_that_with_gap
    wh_vs_that_with_gap_long_distance
    """.split()  # noqa: SIM905
)
"""The 67 files of BLiMP."""
OTHER_FIELDS: tuple[tuple[str, ...], ...] = (
    (),
    ("one_prefix_prefix", "one_prefix_word_good", "one_prefix_word_bad"),
    ("two_prefix_prefix_good", "two_prefix_prefix_bad", "two_prefix_word"),
    ("one_prefix_prefix", "one_prefix_word_good", "one_prefix_word_bad", "dependency_length"),
    ("crucial_item",),
)
"""What lines of some of these files have between the sentences and `field`."""


def lambada(folder: Path, count: int = 7) -> Path:
    """{"text": ...} lines; one last word has a quotation mark before it."""
    draw = random.Random(1)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(4, 30))).capitalize() for _ in range(count)]
    texts[1] += ' she said, "Stone'
    path = folder / "lambada_test.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def blimp(folder: Path, count: int = 5, sets: tuple[str, ...] = SETS) -> Path:
    """A file for each of `sets`, with the published fields; their sizes differ."""
    draw, place = random.Random(2), folder / "blimp" / "data"
    place.mkdir(parents=True)
    for number, name in enumerate(sets):
        lines = []
        for pair in range(count + number % 10):
            good = draw.choices(WORDS, k=draw.randint(3, 9))
            while good == good[::-1]:  # one text twice: rounding would decide between them
                good = draw.choices(WORDS, k=len(good))
            row = {
                "sentence_good": " ".join(good).capitalize() + ".",
                "sentence_bad": " ".join(reversed(good)).capitalize() + ".",
                **dict.fromkeys(OTHER_FIELDS[number % len(OTHER_FIELDS)], "Stone sentences"),
                "field": "syntax",
                "linguistics_term": "island_effects",
                "UID": name,
                "simple_LM_method": True,
                "one_prefix_method": False,
                "two_prefix_method": False,
                "lexically_identical": True,
                "pairID": str(pair),
            }
            lines.append(json.dumps(row) + "\n")
        (place / f"{name}.jsonl").write_text("".join(lines))
    return folder / "blimp"


def cbt(folder: Path, count: int = 3) -> Path:
    """Four files of numbered blocks; the last question of each has nine candidates, which no protocol asks."""
    draw, place = random.Random(3), folder / "CBTest" / "data"
    place.mkdir(parents=True)
    for kind in ("NE", "CN", "V", "P"):
        blocks = []
        for number in range(count + 1):
            lines = [
                f"{line} `` {' '.join(draw.choices(WORDS, k=4)).capitalize()} , '' he did n't say ."
                for line in range(1, 21)
            ]
            candidates = draw.sample(WORDS, 9 if number == count else 10)
            before, after = (" ".join(draw.choices(WORDS, k=k)) for k in (3, draw.randint(1, 4)))
            lines.append(f"21 {before} XXXXX , {after} !\t{candidates[2]}\t\t{'|'.join(candidates)}")
            blocks.append("\n".join(lines) + "\n\n")
        (place / f"cbtest_{kind}_test_2500ex.txt").write_text("".join(blocks))
        (place / f"cbtest_{kind}_train.txt").write_text("another file of the archive")
    return folder / "CBTest"
