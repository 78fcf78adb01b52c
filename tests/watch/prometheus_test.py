"""Every expression of the alert rules, the dashboards and the autoscalers, by a real Prometheus that scrapes real servers."""
import json
import re
import shutil
import tempfile
import time
import unittest

from expressions import DASHBOARDS, names_of, of_dashboards, of_rules, of_scalers, variables_of
from prometheus import Prometheus
from served import SOURCE, Server, certificate, ended, eventually, skip

# What a server on a host without a GPU has no series of, and their labels.
NOT_HERE = {
    'structkv_cuda_errors_total': {'kind'},
    # No server here has a collector.
    'structkv_trace_spans_total': {'result'},
    # Nor is there a proxy; tests/haproxy.sh asks a real one for these.
    'haproxy_backend_active_servers': {'proxy'},
    'haproxy_process_start_time_seconds': set(),
}
TARGET_LABELS = {'job', 'namespace', 'pod', 'instance', '__name__'}
CODES = {'ok', 'cancelled', 'unknown', 'invalid_argument', 'deadline_exceeded', 'not_found', 'already_exists',
         'permission_denied', 'resource_exhausted', 'failed_precondition', 'aborted', 'out_of_range', 'unimplemented',
         'internal', 'unavailable', 'data_loss', 'unauthenticated'}
# Values that a label may have beside those that were seen.
VALUES = {'result': CODES, 'reason': CODES, 'job': {'structkv-proxy'}}
CHOSEN = {'$__rate_interval': '15s', '$namespace': 'structkv'}
LIMIT_S = 30


def load(server, held=None):
    """Prompts that end in every way that a rule or a panel tells apart."""
    server.compress('--method', 'snapkv')
    server.compress()
    server.run('bench', '--tokens', '1000000', '--prompts', '1', fails=True)  # no room
    if held:
        with tempfile.TemporaryDirectory() as folder:
            handle = json.loads(server.compress('--hold', '--json'))['handle']
            server.run('fetch', handle, '--to', f'{folder}/fetched.safetensors', '--release')
            server.run('fetch', handle, '--to', f'{folder}/fetched.safetensors', fails=True)  # not found
        server.compress('--hold', '--hold-lease', '0.2')  # expires
        server.compress('--transport', 'inline')


class SecureServer(Server):
    def __init__(self, paths):
        self._authority = paths[0]
        super().__init__('--tls-certificate', paths[0], '--tls-key', paths[1])

    def command(self, *words):
        return super().command(*words) + ['--tls-authorities', self._authority]


class PrometheusTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.server = cls.enterClassContext(Server('--hold-budget', '64MiB', '--memory-budget', '1GiB',
                                                  '--region-socket', f'{folder}/regions'))
        secure = cls.enterClassContext(SecureServer(cls.enterClassContext(certificate())))
        cls.servers = [cls.server, secure]
        cls.prometheus = cls.enterClassContext(Prometheus(cls.servers))
        # Twice, so that counters begin and then rise.
        for _ in range(2):
            load(cls.server, held=True)
            load(secure)
            at = time.time()
            eventually('what there was is scraped', lambda: cls.scraped_after(at))

    @classmethod
    def scraped_after(cls, at):
        times = cls.prometheus.get('query', query='timestamp(up{job="structkv"} == 1)')['result']
        return len(times) == 2 and all(float(sample['value'][1]) > at for sample in times)

    def filled(self, text, pod):
        for name, value in {**CHOSEN, '$pod': pod}.items():
            text = text.replace(name, value)
        return text

    def labels_of(self, metric):
        """Label -> values, of what there is of the metric."""
        series = self.prometheus.series(metric)
        if metric in NOT_HERE:
            self.assertEqual(series, [], f'{metric} is here: it is to leave NOT_HERE')
            return {label: set() for label in NOT_HERE[metric] | TARGET_LABELS}
        self.assertTrue(series, f'{metric} is unknown')
        labels = {}
        for one in series:
            for label, value in one.items():
                labels.setdefault(label, set()).add(value)
        return labels

    def check_names(self, expression, pod='structkv-0'):
        names = names_of(self.filled(expression.text, pod))
        known = set()
        for metric, matchers in names.selectors:
            labels = self.labels_of(metric)
            known |= set(labels)
            for label, operator, value in matchers:
                self.assertIn(label, labels, f'{metric} has no label {label}')
                if operator in ('!=', '!~') or value == '.*':
                    continue
                if '.*' in value:
                    self.assertTrue(any(re.fullmatch(value, one) for one in labels[label]), f'{metric} has no {label}=~"{value}"')
                    continue
                for one in re.fullmatch(r'[\w|-]+', value).group().split('|'):
                    may_be = labels[label] | VALUES.get(label, set())
                    self.assertTrue(one in may_be or metric in NOT_HERE, f'{metric} has no {label}{operator}"{one}"')
        self.assertTrue(names.selectors)
        self.assertLessEqual(names.labels | expression.shown - {'value'}, known, 'labels that there are not')

    def check_shows(self, expression, pod):
        """Answered, with something to see and every label that the legend names."""
        def shown():
            result = self.prometheus.query(self.filled(expression.text, pod))
            return result or None
        if expression.may_be_empty or any(metric in NOT_HERE for metric, _ in names_of(self.filled(expression.text, pod)).selectors):
            shown()
            return
        for labels in eventually(f'{expression.where} shows something', shown, LIMIT_S):
            self.assertLessEqual(expression.shown, {label for label, value in labels.items() if value})

    def test_every_rule_asks_for_what_there_is(self):
        for expression in of_rules():
            with self.subTest(expression.where):
                self.check_names(expression)
                self.check_shows(expression, pod='')

    def test_every_panel_asks_for_what_there_is_and_shows_it(self):
        for expression in of_dashboards():
            for pod in ('structkv-0', '.*'):
                with self.subTest(expression.where, pod=pod):
                    self.check_names(expression, pod)
                    self.check_shows(expression, pod)

    def test_every_autoscaler_asks_for_what_there_is(self):
        for expression in of_scalers():
            with self.subTest(expression.where):
                self.check_names(expression)
                self.check_shows(expression, pod='')

    def test_every_choice_of_a_dashboard_has_something_to_choose(self):
        for path in DASHBOARDS:
            for name, metric, label in variables_of(json.loads(path.read_text())):
                with self.subTest(path.name, variable=name):
                    self.assertTrue(self.labels_of(metric)[label])

    def test_prometheus_evaluates_every_rule(self):
        names = {expression.where for expression in of_rules()}

        def evaluated():
            rules = self.prometheus.rules()
            return all(rule['health'] != 'unknown' for rule in rules) and rules
        rules = eventually('rules are evaluated', evaluated, LIMIT_S)
        self.assertEqual({rule['name'] for rule in rules}, names)
        for rule in rules:
            self.assertEqual((rule['health'], rule.get('lastError', '')), ('ok', ''), rule['name'])

    def test_every_metric_of_the_documentation_is_there(self):
        page = (SOURCE / 'docs/operations.md').read_text()
        rows = re.findall(r'^\| (`structkv_[^|]*)\|([^|]*)\|', page[page.index('### Metrics'):], re.MULTILINE)
        self.assertGreater(len(rows), 20)
        optional = set(NOT_HERE)
        for cell, words in rows:
            named = set(re.findall(r'\w+', words)) | TARGET_LABELS
            for metric in set(re.findall(r'`(structkv_\w+)`', cell)) - optional:
                with self.subTest(metric):
                    series = self.prometheus.series(metric) + self.prometheus.series(metric + '_bucket')
                    self.assertTrue(series, 'not there')
                    labels = set().union(*series) - {'le'}
                    self.assertEqual(labels | TARGET_LABELS, named)

    def test_no_server_is_scraped_in_vain(self):
        for target in self.prometheus.get('targets')['activeTargets']:
            self.assertEqual((target['health'], target['lastError']), ('up', ''))


class OutageTest(unittest.TestCase):
    """What Prometheus makes of a server's end."""

    def states(self, prometheus):
        return {rule['name']: rule['state'] for rule in prometheus.rules()}

    def test_a_server_that_ends_is_noticed(self):
        with Server() as server, Server() as other, Prometheus([server, other]) as prometheus:
            eventually('both are up', lambda: len(prometheus.query('up{job="structkv"} == 1')) == 2)
            eventually('no alert is raised', lambda: set(self.states(prometheus).values()) == {'inactive'})
            ended(server.process)
            eventually('it is noticed', lambda: self.states(prometheus)['StructKVDown'] == 'pending')
            self.assertEqual(self.states(prometheus)['StructKVNoneUp'], 'inactive')
            ended(other.process)
            eventually('that none is up is noticed', lambda: self.states(prometheus)['StructKVNoneUp'] == 'pending')


if __name__ == '__main__':
    if not shutil.which('prometheus') or not shutil.which('openssl'):
        skip('prometheus or openssl is not installed (scripts/setup --watch)')
    unittest.main()
