"""`make docs`: write the documents that are made from the code."""

from pathlib import Path

from deploy.documents.pages import PAGES

PROJECT = Path(__file__).parents[2]

for name, made in PAGES.items():
    (PROJECT / name).write_text(made())
    print(name)
