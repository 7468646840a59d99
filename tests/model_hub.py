"""A small Hugging Face hub for models on localhost, and what pushing and loading do with it. Run by test_hub.py, in a
process of its own and in an empty folder: the hub's client reads its settings once, when it is imported. Prints one
line of JSON."""
import base64, hashlib, json, os, re, sys, threading, time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = 'hf_good'
repos, blobs, private = {}, {}, {}      # name → file → content; hash → content; name → is it private?


def newest(repo): return hashlib.sha1(repr(repos[repo]).encode()).hexdigest()


class Hub(BaseHTTPRequestHandler):
    def log_message(self, *args): pass

    def reply(self, body=b'', status=200, **headers):
        if not isinstance(body, bytes): body = json.dumps(body).encode()
        self.send_response(status)
        for k, v in dict(headers, Content_Length=len(body)).items(): self.send_header(k.replace('_', '-'), str(v))
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(body)

    def body(self): return self.rfile.read(int(self.headers['Content-Length'] or 0))

    def do_GET(self):
        path = self.path.split('?')[0]
        found = re.fullmatch('/(.+?)/resolve/[^/]+/(.+)', path)
        if path == '/': return self.reply()
        if not found or found[1] not in repos: return self.reply(status=404, X_Error_Code='RepoNotFound')
        content = repos[found[1]].get(found[2])
        if content is None: return self.reply(status=404, X_Error_Code='EntryNotFound', X_Repo_Commit=newest(found[1]))
        self.reply(content, X_Repo_Commit=newest(found[1]), ETag=f'"{hashlib.sha256(content).hexdigest()}"')

    do_HEAD = do_GET

    def do_PUT(self):
        blobs[self.path.rpartition('/')[2]] = self.body()
        self.reply()

    def do_POST(self):
        path, body = self.path.split('?')[0], self.body()
        if path == '/api/validate-yaml': return self.reply(dict(errors=[], warnings=[]))
        if self.headers['Authorization'] != f'Bearer {TOKEN}': return self.reply(dict(error='Invalid token'), 401)
        api = re.fullmatch('/api/models/(.+)/(preupload|commit)/main', path)
        if path == '/api/repos/create': self.create(json.loads(body))
        elif path.endswith('/objects/batch'): self.reply(self.batch(json.loads(body)))
        elif api and api[2] == 'preupload': self.reply(dict(files=[self.mode(f) for f in json.loads(body)['files']]))
        elif api: self.commit(api[1], [json.loads(line) for line in body.splitlines()])
        else: self.reply(status=404)

    def create(self, asked):
        name = f'{asked["organization"]}/{asked["name"]}'
        if asked['organization'] == 'other': return self.reply(dict(error='Not your namespace'), 403)
        status = 409 if name in repos else 200
        repos.setdefault(name, {})
        private.setdefault(name, asked.get('private') or asked.get('visibility') == 'private')
        self.reply(dict(url=f'{self.server.url}/{name}', name=name), status)

    def mode(self, file):
        return dict(path=file['path'], shouldIgnore=False,
                    uploadMode='lfs' if file['path'].endswith('.safetensors') else 'regular')

    def batch(self, asked):
        objects = [dict(o, actions=dict(upload=dict(href=f'{self.server.url}/lfs/{o["oid"]}')))
                   for o in asked['objects']]
        return dict(transfer='basic', objects=objects)

    def commit(self, repo, lines):
        for o in lines:
            v = o['value']
            if o['key'] == 'file': repos[repo][v['path']] = base64.b64decode(v['content'])
            if o['key'] == 'lfsFile': repos[repo][v['path']] = blobs[v['oid']]
        self.reply(dict(commitUrl=f'{self.server.url}/{repo}/commit/{newest(repo)}', commitOid=newest(repo)))


def serve():
    "A hub that runs, and is the one that the client will ask"
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.url = os.environ['HF_ENDPOINT'] = f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def error(f, *args, **kwargs):
    "Class and message of what is raised, the folder that is left, and how long it took"
    before, start = {*os.listdir()}, time.monotonic()
    try: f(*args, **kwargs)
    except Exception as e: said = [type(e).__name__, str(e)]
    else: said = None
    left = [os.path.abspath(o) for o in {*os.listdir()} - before]
    return dict(said=said, left=left, files=[sorted(os.listdir(o)) for o in left], seconds=time.monotonic() - start)


def main():
    server = serve()
    import huggingface_hub.utils
    from safetensors.torch import load_file
    from torch import nn
    from fastswa.training.events import Callback
    from fastswa.callbacks.batchnorm import BNUpdateCB
    from fastswa.callbacks.swa import EMACB, SWACB
    from fastswa.checkpoint.hub import load_from_hub
    from fastswa.core import quiet
    from helpers import copied, learner, net, same
    huggingface_hub.utils.disable_progress_bars()
    learn = learner(EMACB(), SWACB(start='1ep', every='2ba'), BNUpdateCB())
    with quiet(): learn.fit(2)
    wanted = {}
    for name in ('raw', 'ema', 'swa'):
        with learn.using(name): wanted[name] = copied(learn.model.state_dict())
    def got(model, name): return same(wanted[name], copied(model.state_dict()))
    push = partial(learn.push_to_hub, 'me/toy')
    res = dict(not_logged_in=error(push, 'ema'), wrong_token=error(push, 'ema', token='hf_bad'))

    os.environ['HF_TOKEN'] = TOKEN
    res['forbidden'] = error(learn.push_to_hub, 'other/toy')
    learn.apply('swa')
    before = {*os.listdir()}
    res['url'] = push('ema', data='Points in three classes.').removeprefix(server.url)
    res |= dict(held=learn.weights, left=sorted({*os.listdir()} - before), files=sorted(repos['me/toy']),
                private=private['me/toy'])
    res['card'] = repos['me/toy']['README.md'].decode()
    res['about'] = json.loads(repos['me/toy']['fastswa.json'])
    res['scores'] = {name: learn.validate(name)[0]['loss'] for name in wanted}

    model = net(seed=9).eval()
    res['by_default'] = load_from_hub('me/toy', model) is model and got(model, 'ema') and not model.training
    res['by_name'] = {name: got(load_from_hub('me/toy', net(seed=9), name), name) for name in wanted}
    res['wrapped'] = got(load_from_hub('me/toy', nn.DataParallel(net(seed=9))).module, 'ema')
    path = huggingface_hub.hf_hub_download('me/toy', 'swa.safetensors')      # as the card says, without fastswa
    plain = net(seed=9)
    plain.load_state_dict(load_file(path))
    res['without_fastswa'] = got(plain, 'swa')

    repos['me/other'] = {'README.md': b'# A model of somebody else'}
    model = nn.Linear(3, 2)
    before = copied(model.state_dict())
    res |= dict(not_ours=error(load_from_hub, 'me/other', model), unknown=error(load_from_hub, 'me/none', model),
                weights=error(load_from_hub, 'me/toy', net(), 'emma'), model=error(load_from_hub, 'me/toy', model))
    res['untouched'] = same(before, copied(model.state_dict()))

    learn.restore()
    learn.push_to_hub('me/toy', 'raw')      # once more: another set is the one that is meant
    res['again'] = got(load_from_hub('me/toy', net(seed=9)), 'raw')
    learn.push_to_hub('me/hidden', private=True)
    res['hidden'] = private['me/hidden']
    class Bad(Callback):
        role = 'measures'
        def before_epoch(self, learn): raise KeyError('a fault of a callback')
    learn.cbs.append(Bad())
    res['fault'] = error(push)
    learn.cbs.pop()

    server.shutdown()
    server.server_close()
    res['closed'] = error(push, 'ema')
    res['from_folder'] = got(load_from_hub(res['closed']['left'][0], net(seed=9)), 'ema')
    res['from_cache'] = got(load_from_hub('me/toy', net(seed=9)), 'raw')
    res['not_cached'] = error(load_from_hub, 'me/hidden', net())
    print(json.dumps(res))


if __name__ == '__main__':
    sys.path.insert(0, os.path.dirname(__file__))
    main()
