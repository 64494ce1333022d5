"""The stages that make the embedded default models; ``scripts/make_embedded.py`` runs them in order."""
