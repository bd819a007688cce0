package store

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Identity is this host's signing key. The private half never leaves the host.
type Identity struct {
	ID  HostID
	Key ed25519.PrivateKey
}

const pemType = "WEFT HOST KEY"

// LoadIdentity reads the host key from dir, or makes one on first start (file
// host.key, mode 0600). Other secrets in dir are one identity's alone: before a new one is
// made they are removed, for the folder may be a copy of that of another host.
func LoadIdentity(dir string, secrets ...string) (Identity, error) {
	path := filepath.Join(dir, "host.key")
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		for _, name := range secrets {
			if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return Identity{}, err
			}
		}
		return makeIdentity(path)
	}
	if err != nil {
		return Identity{}, err
	}
	block, _ := pem.Decode(raw)
	if block == nil || block.Type != pemType || len(block.Bytes) != ed25519.SeedSize {
		return Identity{}, fmt.Errorf("host key %s is damaged; restore it, or remove it to give this host a new identity", path)
	}
	return identity(ed25519.NewKeyFromSeed(block.Bytes)), nil
}

func makeIdentity(path string) (Identity, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return Identity{}, err
	}
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return Identity{}, err
	}
	return identity(key), WriteSecret(path, pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: key.Seed()}))
}

// WriteSecret replaces a file that its owner alone reads. It is written beside and
// renamed, so that a crash leaves the old or the new one.
func WriteSecret(path string, raw []byte) error {
	tmp := path + ".new"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(raw)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

func identity(key ed25519.PrivateKey) Identity {
	return Identity{ID: HostIDOf(key.Public().(ed25519.PublicKey)), Key: key}
}

// HostIDOf returns the id that belongs to a public key.
func HostIDOf(pub ed25519.PublicKey) HostID {
	sum := sha256.Sum256(pub)
	return HostID(hex.EncodeToString(sum[:16]))
}
