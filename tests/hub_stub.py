"""A small Hugging Face hub on localhost, and what `fashion_mnist()` does with it. Run by test_data.py, in a process of
its own: the hub's client reads its settings once, when it is imported. It does all of it again in a fork that is told
to stay offline. Prints a line of JSON for each."""
import json, os, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

REPO, COMMIT, FILES = 'zalando-datasets/fashion_mnist', 'c'*40, {}

class Hub(BaseHTTPRequestHandler):
    def log_message(self, *args): pass

    def reply(self, body, status=200, **headers):
        self.send_response(status)
        for k, v in dict(headers, Content_Length=len(body)).items(): self.send_header(k.replace('_', '-'), str(v))
        self.end_headers()
        if self.command == 'GET': self.wfile.write(body)

    def do_GET(self):
        path, api = self.path.split('?')[0], f'/api/datasets/{REPO}'
        name = path.rpartition(f'/{REPO}/resolve/{COMMIT}/')[2]
        if path == '/': self.reply(b'')
        elif path in (api, f'{api}/revision/{COMMIT}'): self.reply(json.dumps(dict(id=REPO, sha=COMMIT)).encode())
        elif path == f'{api}/tree/{COMMIT}':
            tree = [dict(type='file', path=k, size=len(v), oid='0'*40) for k, v in FILES.items()]
            self.reply(json.dumps(tree).encode())
        elif name in FILES: self.reply(FILES[name], X_Repo_Commit=COMMIT, ETag=f'"{name}"')
        else: self.reply(b'', 404, X_Error_Code='EntryNotFound', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

slept = []

def timed(f):
    "What `f` gave, or the message of its error, and how many seconds it wanted to wait before it tried again"
    slept.clear()
    try: dd = f()
    except FileNotFoundError as e: res = str(e)
    else: res = dict(sizes=[len(dd['train']), len(dd['test'])], names=dd['train'].features['label'].names[:2])
    return res, sum(slept)

def main():
    from fastswa.data import sources      # imports torch, once for both, and not the hub's client
    told = os.fork()
    if told:
        assert os.waitpid(told, 0)[1] == 0
        os.environ['HF_HUB_OFFLINE'] = '1'
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ['HF_ENDPOINT'] = f'http://127.0.0.1:{server.server_port}'

    import datasets, numpy as np
    datasets.disable_progress_bars()
    # what this machine has must not be found first
    sources._system = os.environ['XDG_CACHE_HOME'] = os.environ['HF_HOME']
    names = ['T - shirt / top'] + sources._classes['fashion_mnist'][1:]  # as the hub spells them
    for split, n in dict(train=5, test=3).items():
        f = BytesIO()
        sources._image_dataset(np.zeros((n, 28, 28), np.uint8), np.arange(n), names, 'stub').to_parquet(f)
        FILES[f'{split}-00000-of-00001.parquet'] = f.getvalue()

    res = {} if datasets.config.HF_HUB_OFFLINE else dict(served=timed(sources.fashion_mnist))
    server.shutdown()
    server.server_close()
    time.sleep = slept.append
    res |= dict(closed=timed(sources.fashion_mnist), not_cached=timed(sources.mnist),
                offline_as_before=datasets.config.HF_HUB_OFFLINE)
    print(json.dumps(res), flush=True)

if __name__ == '__main__': main()
