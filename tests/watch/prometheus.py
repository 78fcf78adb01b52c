"""A real Prometheus that scrapes servers every second, and evaluates the alert rules."""
import json
import re
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request

from expressions import RULES
from served import ended, eventually, skip

CONFIG = '''
global: {{scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}}
rule_files: ['{rules}']
scrape_configs:
- job_name: structkv
  static_configs:
{targets}
'''
TARGET = "  - {{targets: ['{admin}'], labels: {{namespace: structkv, pod: structkv-{number}}}}}\n"


class Prometheus:
    def __init__(self, servers):
        program = shutil.which('prometheus')
        if program is None:
            skip('prometheus is not installed (scripts/setup --watch)')
        self._folder = tempfile.TemporaryDirectory()
        folder = self._folder.name
        with open(f'{folder}/config.yaml', 'w') as config:
            config.write(CONFIG.format(rules=RULES, targets=''.join(
                TARGET.format(admin=server.admin, number=number) for number, server in enumerate(servers))))
        self._log = f'{folder}/log'
        with open(self._log, 'w') as log:
            self.process = subprocess.Popen(
                [program, f'--config.file={folder}/config.yaml', f'--storage.tsdb.path={folder}/data',
                 '--web.listen-address=127.0.0.1:0'], stderr=log, stdout=log)
        self.url = 'http://' + eventually('Prometheus listens', self._address)
        eventually('Prometheus is ready', self._ready)

    def _address(self):
        with open(self._log) as log:
            text = log.read()
        if self.process.poll() is not None:
            raise AssertionError(f'Prometheus does not start: {text}')
        listening = re.search(r'msg="Listening on" address=(127\.0\.0\.1:[1-9]\d*)', text)
        return listening and listening.group(1)

    def _ready(self):
        try:
            with urllib.request.urlopen(f'{self.url}/-/ready', timeout=10):
                return True
        except urllib.error.HTTPError:
            return False

    def get(self, path, **parameters):
        """The data of an answer of the API; what it complains of is a ValueError."""
        url = f'{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}'
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)['data']
        except urllib.error.HTTPError as error:
            raise ValueError(json.load(error)['error']) from None

    def query(self, expression):
        """The series of an expression's result: their labels."""
        data = self.get('query', query=expression)
        return [series['metric'] for series in data['result']] if data['resultType'] != 'scalar' else [{}]

    def series(self, metric):
        return self.get('series', **{'match[]': metric})

    def rules(self):
        return [rule for group in self.get('rules')['groups'] for rule in group['rules']]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        ended(self.process)
        self._folder.cleanup()
