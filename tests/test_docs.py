"""Links of the README and of `docs/` lead somewhere."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]


def anchors(text: str) -> set[str]:
  """What a heading is called in a link."""
  prose = re.sub(r'(?ms)^```.*?^```$', '', text)
  heads = re.findall(r'(?m)^#+ (.*)$', prose)
  return {re.sub(r'[^\w\- ]', '', head.lower()).replace(' ', '-') for head in heads}


def broken(page: pathlib.Path) -> list[str]:
  """Links of a page, all but those of the web, that lead nowhere."""
  wrong = []
  for link in re.findall(r'\]\(([^)\s]+)\)', page.read_text('utf-8')):
    if link.startswith('http'):
      continue
    path, _, anchor = link.partition('#')
    target = (page.parent / path).resolve() if path else page
    if not target.exists() or (anchor and anchor not in anchors(target.read_text('utf-8'))):
      wrong.append(link)
  return wrong


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
  assert not broken(page)


def test_links_that_do_not_are_found(tmp_path):
  (tmp_path / 'there.md').write_text('# A head, of `code`\n')
  page = tmp_path / 'page.md'
  page.write_text(
    '[a](there.md#a-head-of-code) [b](there.md#another) [c](gone.md) [d](#here)\n# Here\n'
  )
  assert broken(page) == ['there.md#another', 'gone.md']
