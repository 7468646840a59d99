"Hands the metadata in settings.ini to setuptools; pyproject.toml lists these fields as dynamic."
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

root = Path(__file__).resolve().parent
ini = ConfigParser(interpolation=None)
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
repository = 'https://github.com/fastswa/fastswa'

def readme():
    "README.md with links that also work on a package index"
    text = (root/'README.md').read_text(encoding='utf-8')
    text = re.sub(r'(!\[[^]]*\]\()(?!\w+:)', rf'\1{repository}/raw/main/', text)
    return re.sub(r'(?<!!)(\[[^]]*\]\()(?!\w+:|#)', rf'\1{repository}/blob/main/', text)

setup(
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme(),
    long_description_content_type='text/markdown',
    keywords=cfg['keywords'].split(),
    author=cfg['author'],
    license=cfg['license'],
    python_requires='>=' + cfg['min_python'],
    packages=find_packages(include=[cfg['lib_name'], cfg['lib_name'] + '.*']),
    package_data={cfg['lib_name']: ['py.typed']},
    install_requires=cfg['requirements'].split(),
    extras_require={k.removesuffix('_requirements'): cfg[k].split() for k in cfg if k.endswith('_requirements')},
    entry_points={'console_scripts': cfg['console_scripts'].split(),
                  'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
)
