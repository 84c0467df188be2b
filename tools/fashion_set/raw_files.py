"""The raw inputs of `build`: their sha256, where they come from, and their licences.

All are files of free packages. Copy them, or unpack the whole packages with `dpkg-deb -x` and
`pip download` + `unzip`, anywhere under the folder given as `--raw`. Name and hash identify them.
"""

from typing import NamedTuple


class RawFile(NamedTuple):
    """One raw input: file name, sha256 in hex, package that has it, author, licence."""

    name: str
    sha256: str
    package: str
    author: str
    licence: str


_ZALANDO = ("Debian dataset-fashion-mnist, github.com/zalandoresearch/fashion-mnist", "Zalando SE")

FASHION = (
    RawFile(
        "train-images-idx3-ubyte.gz",
        "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
        *_ZALANDO,
        "MIT",
    ),
    RawFile(
        "train-labels-idx1-ubyte.gz",
        "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
        *_ZALANDO,
        "MIT",
    ),
    RawFile(
        "t10k-images-idx3-ubyte.gz",
        "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
        *_ZALANDO,
        "MIT",
    ),
    RawFile(
        "t10k-labels-idx1-ubyte.gz",
        "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
        *_ZALANDO,
        "MIT",
    ),
)

DIGITS = RawFile(
    "digits.png",
    "60c917758ef97cc090f35cd8e293e4de691ef942847da0ff80dedab33d57c662",
    "Debian opencv-doc (samples/data/digits.png)",
    "Yann LeCun and Corinna Cortes (MNIST), tiled by the OpenCV project",
    "CC BY-SA 3.0",
)

FONTS = (
    RawFile(
        "DejaVuSans.ttf",
        "3fdf69cabf06049ea70a00b5919340e2ce1e6d02b0cc3c4b44fb6801bd1e0d22",
        "PyPI matplotlib 3.11",
        "the DejaVu fonts team",
        "Bitstream Vera licence",
    ),
    RawFile(
        "DejaVuSans-Bold.ttf",
        "b184b89e3c1075f22f6b71575b6fc20d4972b3cfd3b23322ca6fd596dcaef167",
        "PyPI matplotlib 3.11",
        "the DejaVu fonts team",
        "Bitstream Vera licence",
    ),
    RawFile(
        "DejaVuSans-Oblique.ttf",
        "ccdf74b350f11fd3dd5774de50e5e6346a1a5da1f5b7d5fb83590665e97a5213",
        "PyPI matplotlib 3.11",
        "the DejaVu fonts team",
        "Bitstream Vera licence",
    ),
    RawFile(
        "DejaVuSansMono.ttf",
        "602ec86b8948cfcd956482fe64f94c36c867770149ef2f791d4613f443bcecb3",
        "PyPI matplotlib 3.11",
        "the DejaVu fonts team",
        "Bitstream Vera licence",
    ),
    RawFile(
        "DejaVuSerif.ttf",
        "107244956e9962b9e96faccdc551825e0ae0898ae13737133e1b921a2fd35ffa",
        "PyPI matplotlib 3.11",
        "the DejaVu fonts team",
        "Bitstream Vera licence",
    ),
    RawFile(
        "DejaVuSerif-Bold.ttf",
        "c3753f2ed6bc673f15846dc45addbeb3b9c872f32fb18fd53a21f1bef1ed7676",
        "PyPI matplotlib 3.11",
        "the DejaVu fonts team",
        "Bitstream Vera licence",
    ),
    RawFile(
        "STIXGeneral.ttf",
        "167378031e2dddc6216d67819c9260e9a06ffc4c478e4e23cb98a6fd44b183c2",
        "PyPI matplotlib 3.11",
        "the STI Pub companies",
        "STIX font licence",
    ),
    RawFile(
        "STIXGeneralBol.ttf",
        "e8533dc7083fa346bda1933d60ea4a83b67d0945bceaf1b3541f82b4a0e2c6a0",
        "PyPI matplotlib 3.11",
        "the STI Pub companies",
        "STIX font licence",
    ),
    RawFile(
        "STIXGeneralBolIta.ttf",
        "98788fd4ba48dfbb2bd026c0e20a247a8b06c7372879628b7a6bb0d5bb09736c",
        "PyPI matplotlib 3.11",
        "the STI Pub companies",
        "STIX font licence",
    ),
    RawFile(
        "ComicNeue-Regular.otf",
        "2728ee8f303e31934e62bf27b044fd7657b0613412d51f7444db1078cc3a7cb2",
        "Debian fonts-comic-neue",
        "Craig Rozynski",
        "OFL 1.1",
    ),
    RawFile(
        "ComicNeue-BoldItalic.otf",
        "317338fd1611f4a18476b5fbbeea367816c6663c6e973e770f1b281fcc90fed4",
        "Debian fonts-comic-neue",
        "Craig Rozynski",
        "OFL 1.1",
    ),
    RawFile(
        "DancingScript-Regular.otf",
        "38178945aaefdea573f4998d8b984985aaebb95964da337b23e77e682d7d3d17",
        "Debian fonts-dancingscript",
        "Pablo Impallari",
        "OFL 1.1",
    ),
    RawFile(
        "DancingScript-Bold.otf",
        "0ef9febbf9cf763e47b51170bc74c5ac0e0cc65918469ec6521729ce11dacd46",
        "Debian fonts-dancingscript",
        "Pablo Impallari",
        "OFL 1.1",
    ),
    RawFile(
        "Humor-Sans.ttf",
        "2ded6a27448c9ed30aaff177744e2bcf1e52e0aab018b2a8be64565df633318f",
        "Debian fonts-humor-sans",
        "Michael Ciuffo",
        "OFL 1.1",
    ),
)

PHOTOS = (
    RawFile(
        "astronaut.png",
        "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
        "PyPI scikit-image 0.26 (skimage/data)",
        "NASA",
        "public domain",
    ),
    RawFile(
        "brick.png",
        "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf",
        "PyPI scikit-image 0.26 (skimage/data)",
        "CC0Textures (Bricks25)",
        "CC0 1.0",
    ),
    RawFile(
        "camera.png",
        "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a",
        "PyPI scikit-image 0.26 (skimage/data)",
        "Lav Varshney",
        "CC0 1.0",
    ),
    RawFile(
        "chelsea.png",
        "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
        "PyPI scikit-image 0.26 (skimage/data)",
        "Stefan van der Walt",
        "CC0 1.0",
    ),
    RawFile(
        "coffee.png",
        "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
        "PyPI scikit-image 0.26 (skimage/data)",
        "Rachel Michetti",
        "CC0 1.0",
    ),
    RawFile(
        "grass.png",
        "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89",
        "PyPI scikit-image 0.26 (skimage/data)",
        "linolafett (DeviantArt)",
        "CC0 1.0",
    ),
    RawFile(
        "gravel.png",
        "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12",
        "PyPI scikit-image 0.26 (skimage/data)",
        "CC0Textures (Gravel04)",
        "CC0 1.0",
    ),
    RawFile(
        "hubble_deep_field.jpg",
        "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
        "PyPI scikit-image 0.26 (skimage/data)",
        "NASA",
        "public domain",
    ),
    RawFile(
        "retina.jpg",
        "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6",
        "PyPI scikit-image 0.26 (skimage/data)",
        "Mikael Haggstrom",
        "CC0 1.0",
    ),
    RawFile(
        "rocket.jpg",
        "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
        "PyPI scikit-image 0.26 (skimage/data)",
        "SpaceX",
        "public domain",
    ),
    RawFile(
        "grace_hopper.jpg",
        "a8ca6d734765703b09728ab47fe59f473d93ae3967fc24c7c0288c3c7adb7130",
        "PyPI matplotlib 3.11 (mpl-data/sample_data)",
        "James S. Davis, United States Navy",
        "public domain",
    ),
    RawFile(
        "china.jpg",
        "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
        "PyPI scikit-learn 1.9 (sklearn/datasets/images)",
        "danielbuechele",
        "CC BY 2.0",
    ),
    RawFile(
        "flower.jpg",
        "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
        "PyPI scikit-learn 1.9 (sklearn/datasets/images)",
        "vultilion",
        "CC BY 2.0",
    ),
    RawFile(
        "aitzgorri_by_Aitzol_Berasategi.jpg",
        "66268e7b48f8854d36a28765fac6e23ec1aee251daa6da1f64715f201020ad36",
        "Debian lomiri-wallpapers-16.04",
        "Aitzol Berasategi",
        "CC BY 4.0",
    ),
    RawFile(
        "Bridge_by_Sander_Klootwijk.jpg",
        "bd86b081f9975e2b83527f71e49b9271a8ab40885428395969d9f7d834d7f050",
        "Debian lomiri-wallpapers-16.04",
        "Sander Klootwijk",
        "CC BY-SA 4.0",
    ),
    RawFile(
        "Dragonfly_by_Bolly.jpg",
        "af5af17841009732def24b09bb1e669a1b09d2b4bdeee7812c371101c30d2bb3",
        "Debian lomiri-wallpapers-16.04",
        "Bolly",
        "CC BY-SA 4.0",
    ),
    RawFile(
        "free_by_Peter_Nerlich.jpg",
        "85a5453c2fed514c75973016f3d862aca62eb7ca087618822469274ac1092373",
        "Debian lomiri-wallpapers-16.04",
        "Peter Nerlich",
        "CC BY-SA 4.0",
    ),
    RawFile(
        "friends_by_Aitzol_Berasategi.jpg",
        "cc40e313c74e421edffe3403def413c16878ce14661cce7ec5915baeab35538d",
        "Debian lomiri-wallpapers-16.04",
        "Aitzol Berasategi",
        "CC BY 4.0",
    ),
    RawFile(
        "greentock_by_Peter_Nerlich.jpg",
        "e7b20e2db9dcd6e2b278ca55873c2110b35d89cd38b04d0b18728726888e6889",
        "Debian lomiri-wallpapers-16.04",
        "Peter Nerlich",
        "CC BY-SA 4.0",
    ),
    RawFile(
        "life_by_Aitzol_Berasategi.jpg",
        "4c119350ead80201fe256850c3d316309ddfb4bdf10b235ce982dcde0c667c05",
        "Debian lomiri-wallpapers-16.04",
        "Aitzol Berasategi",
        "CC BY 4.0",
    ),
    RawFile(
        "picosdeeuropa_by_Aitzol_Berasategi.jpg",
        "414d0072b2f6f2c555deafeaef6e45c4fed6fa9ad26eba6560ca8803959cf97a",
        "Debian lomiri-wallpapers-16.04",
        "Aitzol Berasategi",
        "CC BY 4.0",
    ),
    RawFile(
        "Picture_0B_by_freespace.jpg",
        "c8c0ab18e48d9e0419fe42881112137f3afafc27dfddc29ec3a6d54c56d225ad",
        "Debian lomiri-wallpapers-16.04",
        "Trevor Freespace",
        "CC BY 4.0",
    ),
    RawFile(
        "Picture_1A_by_freespace.jpg",
        "89e86af38d04daaef975665dc2127e9fa76f0fd68f4eea105a2d0ae3390b010b",
        "Debian lomiri-wallpapers-16.04",
        "Trevor Freespace",
        "CC BY 4.0",
    ),
    RawFile(
        "seeding_by_Clements_Engelhardt.jpg",
        "a5634d1ab5e41a3568e92d4a894a500c92b891f9ff734e50bd224d6e185a605f",
        "Debian lomiri-wallpapers-16.04",
        "Clemens Engelhardt",
        "CC0 1.0",
    ),
    RawFile(
        "sunset_by_Aitzol_Berasategi.jpg",
        "474dab6a4b9f94dc76c29dfe30e9f5db4af0fd2e33fe5d695f8152b371efca18",
        "Debian lomiri-wallpapers-16.04",
        "Aitzol Berasategi",
        "CC BY 4.0",
    ),
    RawFile(
        "Wine_by_Jakkub_Mede.jpg",
        "d2e96e6d4da40dd804b3d0ce295e94de04a2d7d9b6785d42cd9d92ba58bced74",
        "Debian lomiri-wallpapers-16.04",
        "Jakub Mede",
        "CC BY 4.0",
    ),
    RawFile(
        "Kleiber_by_Lukas_Baubkus.jpg",
        "6572410c09f4492c74ccadde133565a14c0161617d5917d4c820c66d65a44ba7",
        "Debian lomiri-wallpapers-20.04",
        "Lukas Baubkus",
        "CC BY-SA 3.0",
    ),
)
