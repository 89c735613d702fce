"""The table of the fourteen published data sets: everything else reads names, counts and addresses from here.

Splits and counts: BiSSL, appendix B.1. Addresses and MD5 sums are those that the sets' authors and torchvision give.
"""

from __future__ import annotations

from .archives import Archive
from .caltech101 import open_caltech101
from .cifar import CIFAR10, CIFAR100, open_cifar10, open_cifar100
from .cub200 import open_cub200
from .dataset import Dataset
from .fashion_mnist import FILES, open_fashion_mnist
from .listed import open_aircraft, open_cars, open_dtd, open_flowers, open_food101
from .pets import open_pets
from .stl10 import STL10_COUNTS, STL10_FOLDER, open_stl10
from .sun397 import open_sun397
from .voc2007 import open_voc2007

VGG = "https://www.robots.ox.ac.uk/~vgg/data"
VOC = "https://thor.robots.ox.ac.uk/pascal/VOC/voc2007"
FASHION_MNIST = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
TORONTO = "https://www.cs.toronto.edu/~kriz"
RESEARCH = "research; the images belong to their owners"

_ALL = (
    Dataset(
        name="stl10",
        title="STL-10",
        reader=open_stl10,
        classes=10,
        counts={"train": STL10_COUNTS["train"], "test": STL10_COUNTS["test"]},
        split=(4000, 1000, 8000),
        pretext=STL10_COUNTS["unlabeled"],
        needs=tuple(
            f"{STL10_FOLDER}/{file}"
            for file in ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin", "unlabeled_X.bin")
        ),
        page="https://cs.stanford.edu/~acoates/stl10/",
        terms="ImageNet's: research and education",
        archives=(
            Archive("http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz", "91f7769df0f17e558f3565bffb0c7dfb"),
        ),
    ),
    Dataset(
        name="flowers",
        title="Oxford 102 Flowers",
        reader=open_flowers,
        classes=102,
        counts={"train": 1020, "val": 1020, "test": 6149},
        split=(1020, 1020, 6149),
        pretext=2040,
        needs=("flowers-102/jpg", "flowers-102/imagelabels.mat", "flowers-102/setid.mat"),
        page=f"{VGG}/flowers/102/",
        terms=RESEARCH,
        archives=(
            Archive(f"{VGG}/flowers/102/102flowers.tgz", "52808999861908f626f3c1f4e79d11fa", "flowers-102"),
            Archive(f"{VGG}/flowers/102/imagelabels.mat", "e0620be6f572b9609742df49c70aed4d", "flowers-102"),
            Archive(f"{VGG}/flowers/102/setid.mat", "a5357ecc9cb78c4bef273ce3793fc85c", "flowers-102"),
        ),
    ),
    Dataset(
        name="cars",
        title="Stanford Cars",
        reader=open_cars,
        classes=196,
        counts={"train": 8144, "test": 8041},
        split=(6598, 1546, 8041),
        pretext=8144,
        needs=(
            "stanford_cars/devkit/cars_meta.mat",
            "stanford_cars/devkit/cars_train_annos.mat",
            "stanford_cars/cars_test_annos_withlabels.mat",
            "stanford_cars/cars_train",
            "stanford_cars/cars_test",
        ),
        page="https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        terms="research; non-commercial",
        by_hand="take cars_train.tgz, cars_test.tgz, car_devkit.tgz and cars_test_annos_withlabels.mat from a copy of "
        "your own or your institution's and unpack them inside stanford_cars",
    ),
    Dataset(
        name="aircraft",
        title="FGVC-Aircraft",
        reader=open_aircraft,
        classes=100,
        counts={"train": 3334, "val": 3333, "test": 3333},
        split=(3334, 3333, 3333),
        pretext=6667,
        needs=(
            "fgvc-aircraft-2013b/data/images",
            "fgvc-aircraft-2013b/data/variants.txt",
            *(f"fgvc-aircraft-2013b/data/images_variant_{part}.txt" for part in ("train", "val", "test")),
        ),
        page=f"{VGG}/fgvc-aircraft/",
        terms="research; non-commercial",
        archives=(
            Archive(f"{VGG}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz", "d4acdd33327262359767eeaa97a4f732"),
        ),
    ),
    Dataset(
        name="dtd",
        title="Describable Textures",
        reader=open_dtd,
        classes=47,
        counts={"train": 1880, "val": 1880, "test": 1880},
        split=(1880, 1880, 1880),
        pretext=3760,
        needs=("dtd/dtd/images", *(f"dtd/dtd/labels/{part}1.txt" for part in ("train", "val", "test"))),
        page=f"{VGG}/dtd/",
        terms="research",
        archives=(Archive(f"{VGG}/dtd/download/dtd-r1.0.1.tar.gz", "fff73e5086ae6bdbea199a49dfb8a4c1", "dtd"),),
    ),
    Dataset(
        name="pets",
        title="Oxford-IIIT Pets",
        reader=open_pets,
        classes=37,
        counts={"train": 3680, "test": 3669},
        split=(2946, 734, 3669),
        pretext=3680,
        needs=(
            "oxford-iiit-pet/images",
            "oxford-iiit-pet/annotations/trainval.txt",
            "oxford-iiit-pet/annotations/test.txt",
        ),
        page=f"{VGG}/pets/",
        terms="CC BY-SA 4.0",
        archives=(
            Archive(f"{VGG}/pets/data/images.tar.gz", "5c4f3ee8e5d25df40f4fd59a7f44e54c", "oxford-iiit-pet"),
            Archive(f"{VGG}/pets/data/annotations.tar.gz", "95a8c909bbe2e81eed6a22bccdf3f68f", "oxford-iiit-pet"),
        ),
    ),
    Dataset(
        name="fashion-mnist",
        title="Fashion-MNIST",
        reader=open_fashion_mnist,
        classes=10,
        counts={"train": 60000, "test": 10000},
        split=(48000, 12000, 10000),
        pretext=60000,
        needs=tuple(f"FashionMNIST/raw/{file}" for files in FILES.values() for file in files),
        page="https://github.com/zalandoresearch/fashion-mnist",
        terms="MIT",
        archives=tuple(
            Archive(f"{FASHION_MNIST}/{file}.gz", md5, "FashionMNIST/raw")
            for file, md5 in (
                ("train-images-idx3-ubyte", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
                ("train-labels-idx1-ubyte", "25c81989df183df01b3e8a0aad5dffbe"),
                ("t10k-images-idx3-ubyte", "bef4ecab320f06d8554ea6380940ec79"),
                ("t10k-labels-idx1-ubyte", "bb300cfdad3c16e7a12a480ee83cd310"),
            )
        ),
    ),
    Dataset(
        name="cifar10",
        title="CIFAR-10",
        reader=open_cifar10,
        classes=10,
        counts={"train": 50000, "test": 10000},
        split=(40000, 10000, 10000),
        pretext=50000,
        needs=tuple(f"{CIFAR10.folder}/{file}" for file in (*CIFAR10.train, *CIFAR10.test, CIFAR10.meta)),
        page=f"{TORONTO}/cifar.html",
        terms="none stated; cite the report",
        archives=(Archive(f"{TORONTO}/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),),
    ),
    Dataset(
        name="cifar100",
        title="CIFAR-100",
        reader=open_cifar100,
        classes=100,
        counts={"train": 50000, "test": 10000},
        split=(40000, 10000, 10000),
        pretext=50000,
        needs=tuple(f"{CIFAR100.folder}/{file}" for file in (*CIFAR100.train, *CIFAR100.test, CIFAR100.meta)),
        page=f"{TORONTO}/cifar.html",
        terms="none stated; cite the report",
        archives=(Archive(f"{TORONTO}/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),),
    ),
    Dataset(
        name="caltech101",
        title="Caltech-101",
        reader=open_caltech101,
        classes=101,
        counts={"train": 3030, "test": 5647},
        split=(2424, 606, 5647),
        pretext=3030,
        needs=("caltech101/101_ObjectCategories",),
        page="https://data.caltech.edu/records/mzrjq-6wc02",
        terms="CC BY 4.0",
        archives=(
            Archive(
                "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip",
                "3138e1922a9193bfa496528edbbc45d0",
                "caltech101",
                ("caltech-101/101_ObjectCategories.tar.gz",),
            ),
        ),
    ),
    Dataset(
        name="food101",
        title="Food-101",
        reader=open_food101,
        classes=101,
        counts={"train": 75750, "test": 25250},
        split=(60600, 15150, 25250),
        pretext=75750,
        needs=("food-101/images", "food-101/meta/train.json", "food-101/meta/test.json"),
        page="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        terms=RESEARCH,
        archives=(Archive("http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz", "85eeb15f3717b99a5da872d97d918f87"),),
    ),
    Dataset(
        name="sun397",
        title="SUN397",
        reader=open_sun397,
        classes=397,
        counts={"train": 19850, "test": 19850},
        split=(15880, 3970, 19850),
        pretext=19850,
        needs=("SUN397/ClassName.txt", "SUN397/Training_01.txt", "SUN397/Testing_01.txt", "SUN397/a"),
        page="https://vision.princeton.edu/projects/2010/SUN/",
        terms=RESEARCH,
        by_hand="take SUN397.tar.gz (MD5 8ca2778205c41d23104230ba66911c7a) and Partitions.zip from a copy of your own "
        "or your institution's, unpack the one, and put ClassName.txt, Training_01.txt and Testing_01.txt of the other "
        "inside SUN397",
    ),
    Dataset(
        name="cub200",
        title="CUB-200-2011",
        reader=open_cub200,
        classes=200,
        counts={"train": 5994, "test": 5794},
        split=(4800, 1194, 5794),
        pretext=5994,
        needs=(
            "CUB_200_2011/images",
            *(f"CUB_200_2011/{f}.txt" for f in ("images", "image_class_labels", "train_test_split", "classes")),
        ),
        page="https://www.vision.caltech.edu/datasets/cub_200_2011/",
        terms="research; non-commercial",
        archives=(
            Archive(
                "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
                "97eceeb196236b17998738112f37df78",
            ),
        ),
    ),
    Dataset(
        name="voc2007",
        title="PASCAL VOC 2007",
        reader=open_voc2007,
        classes=20,
        counts={"train": 2501, "val": 2510, "test": 4952},
        split=(2501, 2510, 4952),
        pretext=5011,
        needs=(
            "VOCdevkit/VOC2007/JPEGImages",
            "VOCdevkit/VOC2007/Annotations",
            *(f"VOCdevkit/VOC2007/ImageSets/Main/{part}.txt" for part in ("train", "val", "test")),
        ),
        page="http://host.robots.ox.ac.uk/pascal/VOC/voc2007/",
        terms="Flickr's; research",
        archives=(
            Archive(f"{VOC}/VOCtrainval_06-Nov-2007.tar", "c52e279531787c972589f7e41ab4ae64"),
            Archive(f"{VOC}/VOCtest_06-Nov-2007.tar", "b6e924de25625d8de591ea690078ad9f"),
        ),
        labels="multi-label",
    ),
)

DATASETS: dict[str, Dataset] = {dataset.name: dataset for dataset in _ALL}
