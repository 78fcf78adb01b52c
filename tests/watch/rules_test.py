"""The alert rules by promtool, each of them with tests and a runbook; and the dashboards' form."""
import json
import re
import shutil
import subprocess
import unittest

from expressions import DASHBOARDS, RULES, alerts, names_of, panels_of, variables_of, yaml
from served import SOURCE, skip

TESTS = sorted((SOURCE / 'tests/watch/alerts').glob('*.yaml'))
VARIABLE = re.compile(r'\$\{?(\w+)')


def promtool(*words):
    done = subprocess.run(['promtool', *map(str, words)], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def anchor(heading):
    """As pages of Markdown make them."""
    return re.sub(r'[^\w\- ]', '', heading.strip().lower()).replace(' ', '-')


class RulesTest(unittest.TestCase):
    def test_promtool_takes_the_rules(self):
        code, text = promtool('check', 'rules', '--lint=all', '--lint-fatal', RULES)
        self.assertEqual(code, 0, text)

    def test_alerts_fire_when_they_should_and_only_then(self):
        code, text = promtool('test', 'rules', *TESTS)
        self.assertEqual(code, 0, text)

    def test_every_alert_is_tried_both_ways(self):
        fires, rests = set(), set()
        for path in TESTS:
            for test in yaml.safe_load(path.read_text())['tests']:
                for case in test['alert_rule_test']:
                    (fires if case.get('exp_alerts') else rests).add(case['alertname'])
        named = {rule['alert'] for rule in alerts()}
        self.assertEqual(fires, named)
        self.assertEqual(rests, named)

    def test_every_alert_has_its_runbook(self):
        for rule in alerts():
            page, _, heading = rule['annotations']['runbook'].partition('#')
            sections = dict(re.findall(r'^#+ (.+)\n((?:(?!#+ ).*\n)*)', (SOURCE / page).read_text(), re.MULTILINE))
            named = {anchor(title): text for title, text in sections.items()}
            self.assertEqual(heading, anchor(rule['alert']))
            self.assertIn(heading, named, f'{page} has no heading {rule["alert"]}')
            for part in ('**Means**', '**Look**', '**Do**'):
                self.assertIn(part, named[heading], rule['alert'])
            self.assertIn(rule['labels']['severity'], named[heading], rule['alert'])

    def test_no_runbook_is_of_an_alert_that_is_gone(self):
        headings = re.findall(r'^#+ (StructKV\w+)$', (SOURCE / 'docs/operations.md').read_text(), re.MULTILINE)
        self.assertEqual(sorted(headings), sorted(rule['alert'] for rule in alerts()))

    def test_refusals_by_every_limit_count(self):
        limits = re.findall(r'_?k\w+Limit = "(\w+)";', (SOURCE / 'service/session/limit.h').read_text())
        self.assertGreater(len(limits), 5)
        rule = next(rule for rule in alerts() if rule['alert'] == 'StructKVRefusesPrompts')
        for limit in [*limits, 'resource_exhausted']:
            self.assertRegex(rule['expr'], rf'["|]{limit}["|]')

    def test_alerts_say_what_and_how_bad(self):
        for rule in alerts():
            self.assertEqual(sorted(rule['annotations']), ['runbook', 'summary'], rule['alert'])
            self.assertIn(rule['labels']['severity'], ('info', 'warning', 'critical'), rule['alert'])


class NamesTest(unittest.TestCase):
    """Of the reader of expressions itself."""

    def test_finds_metrics_matchers_and_groupings(self):
        names = names_of('sum by (a, b) (rate(x_total{r=~"o|p", s!="t"}[5m])) / on (c) group_left (d) y offset 5m > 0.5')
        self.assertEqual(names.selectors, [('x_total', [('r', '=~', 'o|p'), ('s', '!=', 't')]), ('y', [])])
        self.assertEqual(names.labels, {'a', 'b', 'c', 'd'})

    def test_takes_no_function_for_a_metric(self):
        names = names_of('histogram_quantile(0.99, sum without (pod) (z_bucket)) unless time() == bool 1')
        self.assertEqual(names.selectors, [('z_bucket', [])])
        self.assertEqual(names.labels, {'pod'})


class DashboardsTest(unittest.TestCase):
    def dashboards(self):
        self.assertGreater(len(DASHBOARDS), 3)
        return [(path.name, json.loads(path.read_text())) for path in DASHBOARDS]

    def test_can_be_told_apart(self):
        dashboards = self.dashboards()
        for key in ('uid', 'title'):
            self.assertEqual(len({dashboard[key] for _, dashboard in dashboards}), len(dashboards), key)
        for name, dashboard in dashboards:
            self.assertEqual(name, dashboard['uid'] + '.json')

    def test_panels_have_titles_units_and_what_they_mean(self):
        for name, dashboard in self.dashboards():
            panels = panels_of(dashboard)
            ids = [panel['id'] for panel in dashboard['panels']]
            self.assertEqual(len(set(ids)), len(ids), name)
            for panel in panels:
                self.assertTrue(panel['title'] and panel['description'] and panel['targets'], f'{name}: {panel["title"]}')
                self.assertTrue(panel['fieldConfig']['defaults']['unit'], f'{name}: {panel["title"]}')
                for target in panel['targets']:
                    self.assertEqual(target['datasource'], {'type': 'prometheus', 'uid': '${datasource}'}, name)

    def test_panels_do_not_overlap(self):
        for name, dashboard in self.dashboards():
            taken = {}
            for panel in dashboard['panels']:
                place = panel['gridPos']
                self.assertLessEqual(place['x'] + place['w'], 24, name)
                for x in range(place['x'], place['x'] + place['w']):
                    for y in range(place['y'], place['y'] + place['h']):
                        self.assertNotIn((x, y), taken, f'{name}: {panel["title"]} and {taken.get((x, y))}')
                        taken[x, y] = panel['title']

    def test_variables_are_declared_and_used(self):
        built_in = {'__rate_interval'}
        for name, dashboard in self.dashboards():
            declared = {variable['name'] for variable in dashboard['templating']['list']}
            used = set()
            for panel in panels_of(dashboard):
                for target in panel['targets']:
                    used |= set(VARIABLE.findall(target['expr'] + target['datasource']['uid']))
            for variable in dashboard['templating']['list']:
                if variable['type'] == 'query':
                    used |= set(VARIABLE.findall(variable['query']['query'] + variable['datasource']['uid']))
            self.assertEqual(used - built_in, declared, name)
            self.assertTrue(list(variables_of(dashboard)), name)


if __name__ == '__main__':
    if not shutil.which('promtool'):
        skip('promtool is not installed (scripts/setup --watch)')
    unittest.main()
