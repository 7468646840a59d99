"Faults of data: broken files, mix-ups, closed networks, odd datasets; and order and determinism across processes"
import gzip, hashlib, json, os, pickle, random, socket, subprocess, sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path

import datasets, numpy as np, PIL.Image, pyarrow as pa, pytest, torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from torch.utils.data import WeightedRandomSampler
from fastswa.data import loaders as data, sources
from fastswa.random_state import set_seed
from fastswa.data.loaders import DataLoaders, collate_dict, inplace
from fastswa.data.sources import fashion_mnist, load_data, mnist, toy_images
from helpers import forkserver

def write_idx(path, a):
    a = np.asarray(a, np.uint8)
    raw = bytes([0, 0, 8, a.ndim]) + np.array(a.shape, '>u4').tobytes() + a.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == '.gz' else raw)

def write_set(folder, n_train=12, n_test=6, end='.gz'):
    "A small set in IDX files; its training labels differ with `n_train`"
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, n in (('train', n_train), ('t10k', n_test)):
        write_idx(folder/f'{prefix}-images-idx3-ubyte{end}', np.arange(n*784).reshape(n, 28, 28) % 251)
        write_idx(folder/f'{prefix}-labels-idx1-ubyte{end}', np.arange(n) % 10)
    return folder

@pytest.fixture
def alone(tmp_path, monkeypatch):
    "No data on this machine, and a hub that refuses"
    def refuse(repo): raise ConnectionError('refused\nand more lines')
    monkeypatch.delenv('FASTSWA_DATA', raising=False)
    monkeypatch.setattr(sources, '_system', str(tmp_path/'system'))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    monkeypatch.setattr(sources, '_from_hub', refuse)
    return tmp_path

@pytest.fixture(scope='module')
def toy(): return toy_images(40, 20)

def n_train(dd): return len(dd['train'])

# --- where it is found

def test_order_of_places(alone, monkeypatch):
    sizes = dict(path=11, env=12, system=13, cache=14)
    write_set(alone/'cache'/'fastswa'/'fashion-mnist', sizes['cache'])
    assert n_train(fashion_mnist()) == sizes['cache']        # where `make data` puts it
    given, env = write_set(alone/'given', sizes['path']), write_set(alone/'env'/'fashion-mnist', sizes['env'])
    write_set(alone/'system'/'fashion-mnist', sizes['system'])
    assert n_train(fashion_mnist()) == sizes['system']
    monkeypatch.setenv('FASTSWA_DATA', str(env.parent))
    assert n_train(fashion_mnist()) == sizes['env']          # not the system's, although it is there
    assert n_train(fashion_mnist(given)) == sizes['path']
    monkeypatch.setenv('FASTSWA_DATA', str(env))             # the folder itself does as well
    assert n_train(fashion_mnist()) == sizes['env']

def test_env_with_the_other_set_only_goes_on(alone, monkeypatch):
    write_set(alone/'env'/'mnist')
    write_set(alone/'system'/'fashion-mnist', 13)
    monkeypatch.setenv('FASTSWA_DATA', str(alone/'env'))
    assert n_train(fashion_mnist()) == 13                    # not MNIST's 12
    assert n_train(mnist()) == 12

def test_a_given_path_does_not_fall_back(alone, monkeypatch):
    monkeypatch.setenv('FASTSWA_DATA', str(write_set(alone/'env')))
    (alone/'empty').mkdir()
    for path in (alone/'empty', alone/'missing'):
        with pytest.raises(FileNotFoundError, match=path.name): fashion_mnist(path)

def test_nowhere_says_what_to_do(alone):
    with pytest.raises(FileNotFoundError) as e: fashion_mnist()
    msg = str(e.value)
    for way in ('dataset-fashion-mnist', 'path=', '$FASTSWA_DATA', 'toy_images()', '(refused)'): assert way in msg
    assert '\n' not in msg
    with pytest.raises(FileNotFoundError) as e: mnist()
    assert 'dataset-fashion-mnist' not in str(e.value)       # that package has no MNIST

def test_load_data(alone):
    (alone/'empty').mkdir()
    write_set(alone/'both'/'mnist', 7)
    assert n_train(load_data(alone/'both')) == 7
    write_set(alone/'both'/'fashion-mnist', 8)
    assert n_train(load_data(str(alone/'both'/'mnist'))) == 7
    with pytest.raises(ValueError, match='several'): load_data(alone/'both')
    with pytest.raises(FileNotFoundError, match='empty'): load_data(alone/'empty')
    for bad in ('cifar', alone/'nothing'):
        with pytest.raises(ValueError, match='fashion_mnist, mnist, toy, or a folder'): load_data(bad)
    assert n_train(load_data('toy')) == 10_000

# --- the hub

def run_hub(home):
    "What the stub tells: with its hub, and of a second start that stays offline"
    env = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'FASTSWA', 'TRANSFORMERS'))}
    out = subprocess.run([sys.executable, Path(__file__).with_name('hub_stub.py')], env=env | dict(HF_HOME=str(home)),
                         capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return [json.loads(o) for o in out.stdout.splitlines() if o[0] == '{']

def test_hub_served_closed_and_cached(tmp_path):
    r, offline = run_hub(tmp_path)
    loaded = dict(sizes=[5, 3], names=['T-shirt/top', 'Trouser'])   # spelt as from the IDX files
    assert r['served'][0] == loaded
    assert r['closed'][0] == loaded                          # from the cache, not an error
    assert 'toy_images()' in r['not_cached'][0]
    assert r['closed'][1] == r['not_cached'][1] == 0         # the client's own retries wait for 23 s
    assert r['offline_as_before'] is False                   # looking into the cache leaves no setting behind
    assert offline['closed'][0] == loaded and offline['offline_as_before'] is True

def test_a_hub_that_never_answers():
    "Without a limit it would be waited for for ever"
    with socket.create_server(('127.0.0.1', 0)) as silent:
        assert not sources.hub_answers(f'http://127.0.0.1:{silent.getsockname()[1]}', seconds=0.5)

# --- broken files

@pytest.mark.parametrize('end', ['.gz', ''])
@pytest.mark.parametrize('name', ['train-images-idx3-ubyte', 'train-labels-idx1-ubyte', 't10k-images-idx3-ubyte',
                                  't10k-labels-idx1-ubyte'])
def test_missing_or_truncated_file(tmp_path, name, end):
    path = write_set(tmp_path, end=end)/f'{name}{end}'
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match=f'{name}.* damaged'): fashion_mnist(tmp_path)
    path.write_bytes(whole[:2])
    with pytest.raises(ValueError, match=name): fashion_mnist(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f'{name}.gz is missing'): fashion_mnist(tmp_path)

def damage(path, how):
    raw = gzip.decompress(path.read_bytes())
    if how == 'no gzip': path.write_bytes(b'<html>not found</html>')
    if how == 'bit flipped':
        z = bytearray(path.read_bytes())
        z[len(z)//2] ^= 255
        path.write_bytes(z)
    if how == 'labels for images': path.write_bytes(path.with_name('train-labels-idx1-ubyte.gz').read_bytes())
    if how == 'too long': path.write_bytes(gzip.compress(raw + b'x'))
    if how == 'float32': path.write_bytes(gzip.compress(b'\0\0\x0d\x03' + raw[4:]))
    if how == 'empty': path.write_bytes(b'')

@pytest.mark.parametrize('how', ['no gzip', 'bit flipped', 'labels for images', 'too long', 'float32', 'empty'])
def test_damaged_file(tmp_path, how):
    path = write_set(tmp_path)/'train-images-idx3-ubyte.gz'
    damage(path, how)
    with pytest.raises(ValueError, match=path.name): fashion_mnist(tmp_path)

def test_counts_and_labels(tmp_path):
    write_set(tmp_path)
    write_idx(tmp_path/'t10k-labels-idx1-ubyte.gz', [1, 2])
    with pytest.raises(ValueError, match='6 images but 2 labels for test'): fashion_mnist(tmp_path)
    write_idx(tmp_path/'t10k-labels-idx1-ubyte.gz', [0, 1, 2, 3, 4, 10])
    with pytest.raises(ValueError, match='label 10 .* 0 to 9'): fashion_mnist(tmp_path)
    assert load_data(tmp_path)['test'].features['label'].num_classes == 11   # a set of your own may have more classes

# --- the two sets share their file names

def test_mixed_up_sets(tmp_path, monkeypatch):
    def sha(n): return hashlib.sha256((np.arange(n) % 10).astype(np.uint8)).hexdigest()
    monkeypatch.setattr(sources, '_sha256', {sha(12): 'fashion_mnist', sha(6): 'fashion_mnist', sha(13): 'mnist'})
    fashion = write_set(tmp_path/'fashion-mnist')
    assert fashion_mnist(tmp_path)['train'].features['label'].names[0] == 'T-shirt/top'
    assert load_data(fashion)['train'].features['label'].names[0] == 'T-shirt/top'    # told by its labels
    with pytest.raises(ValueError, match='fashion_mnist, not of mnist'): mnist(fashion)
    half = write_set(tmp_path/'half', n_train=13)            # MNIST's training set beside Fashion-MNIST's test set
    for f in (mnist, load_data):
        with pytest.raises(ValueError, match='test labels of fashion_mnist, not of mnist'): f(half)
    monkeypatch.setenv('FASTSWA_DATA', str(fashion))
    with pytest.raises(ValueError, match='not of mnist'): mnist()

def test_the_real_thing(fmnist):
    dd = fmnist
    assert (len(dd['train']), len(dd['test'])) == (60_000, 10_000)
    x, y = DataLoaders.in_memory(dd, 256, device='cpu').train.dataset.tensors
    assert x.shape == (60_000, 1, 28, 28) and (x[5, 0].numpy() == np.array(dd['train'][5]['image'])).all()
    assert y.bincount().tolist() == [6000]*10
    assert abs(x.double().mean()/255 - 0.2860) < 1e-4        # the mean that everyone normalises with
    _, _, folder = dd['train'].info.description.partition('fashion_mnist from ')
    if folder:                                               # and not the hub
        with pytest.raises(ValueError, match='fashion_mnist, not of mnist'): mnist(folder)

# --- toy images

def sums_of_toy_images():
    torch.set_num_threads(1)
    x, y = data._tensors(toy_images(300, 10)['train'], 'cpu')
    return x.long().sum().item(), (x.flatten(1).long()*torch.arange(784)).sum().item(), y.tolist()

def test_toy_images_are_the_same_in_another_process():
    with ProcessPoolExecutor(1, mp_context=forkserver()) as pool: other = pool.submit(sums_of_toy_images).result()
    assert other == sums_of_toy_images()

def test_toy_images_say_so_and_draw_from_no_global_generator(capsys):
    set_seed(0)
    state = torch.get_rng_state()
    toy_images(5, 5)
    assert capsys.readouterr().out.startswith('toy data: ')
    assert torch.equal(torch.get_rng_state(), state)

def test_toy_images_can_be_learned_but_not_quickly(toy):
    "A nearest class mean finds some of it: neither noise (10 %) nor trivial"
    dd = toy_images(4000, 1000)
    (x, y), (xt, yt) = (data._tensors(dd[k], 'cpu') for k in ('train', 'test'))
    means = torch.stack([x[y == i].double().mean(0) for i in range(10)]).flatten(1)
    acc = (torch.cdist(xt.double().flatten(1), means).argmin(1) == yt).double().mean()
    assert 0.3 < acc < 0.8

# --- odd datasets in memory

PNG = BytesIO()
PIL.Image.new('L', (4, 4)).save(PNG, 'png')
PNG = dict(bytes=PNG.getvalue(), path=None)

def small(n=4, images=None, labels=None, names=('a', 'b', 'c')):
    "A dataset of which the labels are not checked when it is made"
    features = Features(image=datasets.Image(), label=ClassLabel(names=list(names)))
    labels = pa.array([i % 3 for i in range(n)] if labels is None else labels, pa.int64())
    table = pa.table(dict(image=pa.array(images or [PNG]*n, features['image'].pa_type), label=labels))
    return Dataset(table, info=datasets.DatasetInfo(features=features))

def encoded(image, format='png'):
    f = BytesIO()
    image.save(f, format)
    return dict(bytes=f.getvalue(), path=None)

def in_memory(train, **kwargs):
    return DataLoaders.in_memory(DatasetDict(train=train, test=small()), 2, device='cpu', **kwargs)

@pytest.mark.parametrize('label', [-1, 3, 2**40])
def test_label_out_of_range(label):
    with pytest.raises(ValueError, match=f'label {label} .* 0 to 2'): in_memory(small(labels=[0, 1, 2, label]))
def test_label_missing():
    with pytest.raises(ValueError, match='1 labels .* missing'): in_memory(small(labels=[0, 1, 2, None]))

def test_images_of_several_shapes():
    other = small(images=[PNG]*3 + [encoded(PIL.Image.new('L', (5, 4)))])
    with pytest.raises(ValueError, match=r'\(1, 4, 4\) and \(1, 4, 5\)'): in_memory(other)
    colour = small(images=[PNG]*3 + [encoded(PIL.Image.new('RGB', (4, 4)))])
    with pytest.raises(ValueError, match=r'\(1, 4, 4\) and \(3, 4, 4\).*RGB'): in_memory(colour)
    x, _ = in_memory(colour.cast_column('image', datasets.Image(mode='L'))).train.dataset.tensors
    assert x.shape == (4, 1, 4, 4)                           # what the message advises, the other way round
    wide = small(images=[encoded(PIL.Image.new('L', (9, 4)))]*4)
    with pytest.raises(ValueError, match=r'\(1, 4, 9\), validation images \(1, 4, 4\)'): in_memory(wide)

def test_shapes_are_compared_beyond_the_first_thousand():
    many = small(1003, images=[PNG]*1002 + [encoded(PIL.Image.new('L', (5, 4)))])
    with pytest.raises(ValueError, match=r'\(1, 4, 5\)'): in_memory(many)

@pytest.mark.parametrize('image', [encoded(PIL.Image.new('I;16', (4, 4))), None])
def test_images_that_are_not_8_bit(image):
    with pytest.raises(ValueError, match='8-bit'): in_memory(small(images=[PNG]*3 + [image]))

@pytest.mark.parametrize('mode, channels', [('1', 1), ('LA', 1), ('P', 3), ('RGBA', 3), ('RGB', 3)])
def test_modes(mode, channels):
    image = PIL.Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)*5).convert(mode)
    x, _ = data._tensors(small(images=[encoded(image)]*4), 'cpu')
    assert x.shape == (4, channels, 4, 4)
    want = np.array(image.convert('L' if channels == 1 else 'RGB')).reshape(4, 4, channels)
    assert (x[0].permute(1, 2, 0).numpy() == want).all()

def test_other_peoples_pgm_files():
    "Only files of one header are taken over undecoded: a comment, or another size of the same length, must not mislead"
    rng = np.random.default_rng(0)
    px = rng.integers(0, 256, (4, 3, 5), np.uint8)
    plain = [encoded(PIL.Image.fromarray(a), 'ppm') for a in px]
    comment = [dict(bytes=b'P5\n# c\n5 3\n255\n' + a.tobytes(), path=None) for a in px]
    for files in (plain, comment, plain[:2] + comment[2:]):
        assert (data._tensors(small(images=files), 'cpu')[0][:, 0].numpy() == px).all()
    turned = [dict(bytes=b'P5 %s 255\n' % size + px[0].tobytes(), path=None) for size in (b'5 3', b'3 5')]
    with pytest.raises(ValueError, match=r'\(1, 3, 5\) and \(1, 5, 3\)'): data._tensors(small(2, images=turned), 'cpu')

def test_columns():
    with pytest.raises(ValueError, match=r'ClassLabel is needed.*image \(Image\), label \(Value\)'):
        in_memory(small().cast_column('label', datasets.Value('int64')))
    with pytest.raises(ValueError, match='type Image .* are 0'): in_memory(small().remove_columns('image'))
    two = small().add_column('other', [PNG]*4).cast_column('other', datasets.Image())
    with pytest.raises(ValueError, match='there are 2'): in_memory(two)

def test_a_transform_is_not_passed_over():
    with pytest.raises(ValueError, match='tfm='): in_memory(small().with_transform(lambda b: b))

@pytest.mark.parametrize('make', [DataLoaders.in_memory, DataLoaders.from_dd])
def test_splits_and_batch_sizes(make):
    dd = DatasetDict(test=small(5), train=small(6))
    for bs in (0, -1, 2.5, True, '8', None):
        with pytest.raises(ValueError, match='bs must be'): make(dd, bs)
    assert len(make(dd, np.int64(4)).train.dataset) == 6
    for k in ('train', 'test'):
        with pytest.raises(ValueError, match=f"'{k}' is empty"): make(DatasetDict(dd, **{k: small(0)}), 4)
    for bad in (DatasetDict(train=small()), DatasetDict(test=small()), small(), {}):
        with pytest.raises(ValueError, match="'train' and one of"): make(bad, 4)
    valid = make(DatasetDict(test=small(5), validation=small(3), train=small(6)), 4).valid
    assert len(valid.dataset) == 3 and valid.batch_size == 8    # validation before test, twice the batch

def test_seed_or_generator(toy):
    with pytest.raises(ValueError, match='not both'): in_memory(small(), seed=1, generator=torch.Generator())
    def order(dl): return torch.cat([yb for _, yb in dl]).tolist()
    def train(**kwargs): return DataLoaders.in_memory(toy, 8, device='cpu', **kwargs).train
    given, seeded = train(generator=torch.Generator().manual_seed(5)), train(seed=5)
    epochs = order(given), order(given)
    assert epochs == (order(seeded), order(seeded))
    assert epochs[0] != epochs[1]                            # a new order each epoch, although seeded

def test_a_generator_resumes_at_its_state(toy):
    dl = DataLoaders.in_memory(toy, 8, device='cpu', seed=5).train
    list(dl)
    state = dl.generator.get_state()
    want = [yb.tolist() for _, yb in dl]
    dl.generator.set_state(state)
    assert [yb.tolist() for _, yb in dl] == want

def test_order_is_drawn_when_the_epoch_starts(toy):
    dl = DataLoaders.in_memory(toy, 8, device='cpu').train
    set_seed(0)
    want = [yb.tolist() for _, yb in dl]
    set_seed(0)
    batches = iter(dl)
    torch.rand(3)                                            # a draw between iter() and the first batch
    assert [yb.tolist() for _, yb in batches] == want

def test_default_dtype_does_not_reach_the_batch(toy):
    torch.set_default_dtype(torch.float64)
    try: xb, _ = next(iter(DataLoaders.in_memory(toy, 8, device='cpu').train))
    finally: torch.set_default_dtype(torch.float32)
    assert xb.dtype == torch.float32

@pytest.mark.gpu
def test_same_order_on_the_gpu(toy):
    def batches(device):
        return [o.cpu() for b in DataLoaders.in_memory(toy, 8, device=device, seed=1).train for o in b]
    assert all(torch.equal(a, b) for a, b in zip(batches('cuda'), batches('cpu'), strict=True))

# --- sample by sample

def noise(b):
    def draw(): return torch.tensor([torch.rand(()).item(), np.random.rand(), random.random()], dtype=torch.float64)
    b['image'] = [draw() for _ in b['image']]
    return b

def test_workers_are_seeded_and_differ(toy):
    dls = DataLoaders.from_dd(toy.with_transform(noise), 5, num_workers=2, shuffle=False)
    def epoch(seed):
        set_seed(seed)
        return torch.cat([xb for xb, _ in dls.train])
    first, other = epoch(0), epoch(1)
    assert torch.equal(first, epoch(0)) and not torch.equal(first, other)
    for column in first.T: assert len(set(column.tolist())) == 40    # torch, numpy, random: no worker repeats another

def test_validation_with_workers_leaves_the_global_generator(toy):
    dls = DataLoaders.from_dd(toy, 8, num_workers=1)
    state = torch.get_rng_state()
    list(dls.valid)
    assert torch.equal(torch.get_rng_state(), state)

def test_collate_can_be_sent_to_a_worker(toy):
    f = pickle.loads(pickle.dumps(collate_dict(toy['train'])))      # spawn and forkserver need it; a closure fails
    assert f([toy['train'][0]])[0].shape == (1, 1, 28, 28)

def test_columns_keep_the_order_of_the_features(toy):
    swapped = inplace(lambda b: b.update(extra=[1]*len(b['label']), image=[1.5]*len(b['label'])))
    ds = toy['train'].with_transform(lambda b: dict(reversed(swapped(b).items())))
    assert [o.tolist() for o in collate_dict(ds)([ds[0]])] == [[1.5], [ds[0]['label']], [1]]

def test_course_style_loaders(toy):
    "The fast.ai course: a transform made with inplace, batch size by position, loaders' arguments passed on"
    @inplace
    def to_tensor(b): b['image'] = [torch.tensor(np.array(o))[None]/255 for o in b['image']]
    assert to_tensor.__name__ == 'to_tensor'
    dls = DataLoaders.from_dd(toy.with_transform(to_tensor), 16, num_workers=2, pin_memory=False)
    xb, yb = next(iter(dls.train))
    assert xb.shape == (16, 1, 28, 28) and yb.dtype == torch.int64
    assert dls.valid.num_workers == 2                        # miniai dropped the arguments it was given
    one = DatasetDict({k: v.remove_columns('label') for k, v in toy.items()})
    batch = next(iter(DataLoaders.from_dd(one, 16).train))
    assert isinstance(batch, tuple) and len(batch) == 1      # miniai: a bare tensor
    assert set(next(iter(DataLoaders.from_dd(toy, 16, as_tuple=False).valid))) == {'image', 'label'}
    assert len(DataLoaders.from_dd(toy, 16, drop_last=True).train) == 2
    assert len(DataLoaders.from_dd(toy, 16, drop_last=True).valid) == 1     # no sample of 20 is left out there

@pytest.mark.parametrize('make', [DataLoaders.from_dd, partial(DataLoaders.in_memory, device='cpu')])
@pytest.mark.parametrize('sampler', [[0, 0, 1, 5], WeightedRandomSampler([1.]*3 + [0.]*3, 4)], ids=['list', 'weighted'])
def test_a_sampler_is_for_the_training_data(make, sampler):
    "Wrong: validation gives the labels that the sampler chooses, and metrics are those of other samples"
    ds = small(6)
    def labels(dl): return torch.cat([yb for _, yb in dl]).tolist()
    dls = make(DatasetDict(train=ds, test=small(5)), 3, sampler=sampler)
    assert labels(dls.valid) == small(5)['label'] and len(dls.train) == 2
    if isinstance(sampler, list): assert labels(dls.train) == [ds['label'][i] for i in sampler]
    else: assert len(labels(dls.train)) == 4
    assert len(make(DatasetDict(train=ds, test=ds), 3, sampler=sampler, drop_last=True).train) == 1

def test_a_batch_sampler_is_for_the_training_data():
    ds = small(6)
    dls = DataLoaders.from_dd(DatasetDict(train=ds, test=ds), 4, batch_sampler=[[0, 1], [5]])
    assert [yb.tolist() for _, yb in dls.train] == [[ds['label'][i] for i in b] for b in ([0, 1], [5])]
    assert [len(yb) for _, yb in dls.valid] == [6]
