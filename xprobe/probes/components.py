"""What the probes are made of: principal components of at most so many, and centring per language."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.decomposition import PCA
from sklearn.utils.validation import check_is_fitted, validate_data


class PrincipalComponents(TransformerMixin, BaseEstimator):
    """``PCA`` of at most ``n_components``: fewer where samples or features are fewer.

    Parameters
    ----------
    n_components : int
    random_state : int, optional
        Of the randomised solver, which is used for wide states.

    Attributes
    ----------
    pca_ : PCA
    n_components_ : int
    """

    def __init__(self, n_components: int = 128, random_state: int | None = None) -> None:
        self.n_components = n_components
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> Self:
        """Finds the components of X [n, d].

        Raises
        ------
        ValueError
            ``n_components`` is not a positive whole number, or X has fewer than two samples.
        """
        if not isinstance(self.n_components, int) or self.n_components < 1:
            raise ValueError(f"n_components must be a whole number of at least 1, got {self.n_components!r}")
        X = validate_data(self, X, ensure_min_samples=2)
        self.n_components_ = min(self.n_components, X.shape[0] - 1, X.shape[1])
        pca = PCA(self.n_components_, power_iteration_normalizer="QR", random_state=self.random_state)
        with np.errstate(invalid="ignore", divide="ignore"):  # states that are all equal have no variance to share
            self.pca_ = pca.fit(X)
        return self

    def transform(self, X: Any) -> Any:
        """Scores [n, n_components_]."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False)
        return self.pca_.transform(X)

    @property
    def _n_features_out(self) -> int:
        return self.n_components_


class LanguageCenterer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Takes from each sample the mean of its language, as learned from the training samples.

    A sample of a language that was not seen in training, or given without ``languages``, is centred by the mean of all.
    In a pipeline, ``languages`` is routed to it (``sklearn.set_config(enable_metadata_routing=True)``,
    ``set_fit_request(languages=True)``, ``set_transform_request(languages=True)``).

    Attributes
    ----------
    mean_ : array [d]
    means_ : dict of language to array [d]
    """

    def fit(self, X: Any, y: Any = None, languages: NDArray | None = None) -> Self:
        """Learns the means of X [n, d]; ``languages`` [n] names each sample's."""
        X = validate_data(self, X, dtype=[np.float64, np.float32])
        self.mean_ = X.mean(axis=0)
        self.means_ = {}
        if languages is not None:
            languages = _checked(languages, X)
            self.means_ = {name: X[languages == name].mean(axis=0) for name in np.unique(languages).tolist()}
        return self

    def transform(self, X: Any, languages: NDArray | None = None) -> Any:
        """X minus each sample's mean, [n, d]."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        if languages is None:
            return X - self.mean_
        languages = _checked(languages, X)
        means = np.stack([self.means_.get(name, self.mean_) for name in languages.tolist()])
        return X - means

    def fit_transform(self, X: Any, y: Any = None, languages: NDArray | None = None) -> Any:
        """``fit(X, y, languages).transform(X, languages)``."""
        return self.fit(X, y, languages).transform(X, languages)


def _checked(languages: NDArray, X: Any) -> NDArray:
    languages = np.asarray(languages)
    if languages.shape != (X.shape[0],):
        raise ValueError(f"languages must name one language for each of {X.shape[0]} samples, got {languages.shape}")
    return languages
