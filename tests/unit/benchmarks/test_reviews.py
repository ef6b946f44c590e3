from __future__ import annotations

from benchmarks.reviews import FOR_CHOOSING, MEASURED, movie_reviews


def test_the_rule_gives_the_same_whole_reviews_always() -> None:
    measured, choosing = movie_reviews(MEASURED), movie_reviews(FOR_CHOOSING)
    assert len(measured) == len(choosing) == 20
    assert not set(measured) & set(choosing)
    assert all(60 <= len(text.split()) <= 120 for text in measured)
    assert movie_reviews(range(3)) == measured[:3]
    assert measured[0].startswith("OK, I am not a professional movie critic")
