"""Real servers, with what the command `structkv` sends them."""
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request

SOURCE = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(os.environ.get('STRUCTKV_BIN', SOURCE / 'build/release/bin'))
CAPTURE = SOURCE / 'tests/data/capture-tiny-llama-1000.safetensors'
LIMIT_S = 60


def skip(reason):
    """Ends the program so that CTest shows it as skipped."""
    print(f'skipped: {reason}')
    sys.exit(77)


def eventually(what, attempt, limit_s=LIMIT_S):
    """The first value of `attempt()` that is true. Fails where there is none within the limit."""
    end = time.monotonic() + limit_s
    while True:
        value = attempt()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f'{what}: not within {limit_s} s')
        time.sleep(0.05)


def ended(process, limit_s=30):
    """Ends a process that is ours, and waits for it."""
    if process.poll() is None:
        process.terminate()
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


class Server:
    """A structkv-server on ports of its own choice."""

    def __init__(self, *flags):
        self._log = tempfile.NamedTemporaryFile('w+', suffix='.log')
        self.process = subprocess.Popen(
            [BIN / 'structkv-server', '--listen', '127.0.0.1:0', '--admin-listen', '127.0.0.1:0', '--threads', '2',
             '--log-format', 'json', *flags], stderr=self._log)
        ready = eventually('the server is ready', self._ready)
        self.address, self.admin = ready['listen'].split(',')[0], ready['admin']
        self.url = f'http://{self.admin}'

    def _ready(self):
        lines = pathlib.Path(self._log.name).read_text()
        if self.process.poll() is not None:
            raise AssertionError(f'the server does not start: {lines}')
        events = [json.loads(line) for line in lines.splitlines() if line.endswith('}')]
        return next((event for event in events if event['event'] == 'ready'), None)

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return answer.read().decode()

    def status(self):
        return json.loads(self.get('/statusz.json'))

    def command(self, *words):
        return [str(word) for word in (BIN / 'structkv', words[0], *words[1:], '--server', self.address)]

    def run(self, *words, fails=False):
        """Runs the command against this server, and returns what it prints."""
        done = subprocess.run(self.command(*words), capture_output=True, text=True, timeout=120)
        if (done.returncode != 0) != fails:
            raise AssertionError(f'{done.args} exits with {done.returncode}: {done.stdout}{done.stderr}')
        return done.stdout + done.stderr

    def compress(self, *words, fails=False):
        with tempfile.TemporaryDirectory() as folder:
            out = [] if '--hold' in words else ['--out', f'{folder}/out.safetensors']
            return self.run('compress', CAPTURE, *out, *words, fails=fails)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        ended(self.process)
        self._log.close()


@contextlib.contextmanager
def certificate():
    """Paths of a certificate of 127.0.0.1, which is its own authority, and of its key."""
    with tempfile.TemporaryDirectory() as folder:
        paths = f'{folder}/tls.crt', f'{folder}/tls.key'
        subprocess.run(['openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes',
                        '-days', '30', '-subj', '/CN=structkv', '-addext', 'subjectAltName=IP:127.0.0.1',
                        '-out', paths[0], '-keyout', paths[1]], check=True, capture_output=True)
        yield paths


@contextlib.contextmanager
def prompt_on_its_way(server, *words):
    """A prompt of a client that stands still in the midst of it; yields what /statusz.json first says of it."""
    client = subprocess.Popen(server.command('bench', '--prompts', '1000', *words),
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def stopped():
        client.send_signal(signal.SIGSTOP)
        running = server.status()['running']
        if running and 0 < running[0]['answered'] < running[0]['layers']:
            return running[0]
        client.send_signal(signal.SIGCONT)
        return None
    try:
        yield eventually('a prompt is on its way', stopped)
    finally:
        client.send_signal(signal.SIGCONT)
        ended(client)
