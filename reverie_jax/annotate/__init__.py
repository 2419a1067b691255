"""Annotation pipeline: questions, right and confusing answers, rationales, and a judge that drops contradictions."""
