//! A replica as far as SVIDs go: it commits and signs what its cell lets it.

use super::Cell;
use super::local::Folder;
use ambit_model::{Code, Refusal};
use ambit_proto::status::to_status;
use ambit_proto::v1;
use ambit_proto::v1::svid_server::{Svid, SvidServer};
use std::sync::{Arc, Mutex};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};

/// What it does with a request.
#[derive(Clone, Debug)]
pub(crate) enum Does {
    Answer,
    Refuse(Code),
    /// Whatever is asked, this is the token.
    Lie(String),
}

#[derive(Clone)]
pub(crate) struct Issuer {
    pub(crate) cell: Arc<Mutex<Cell>>,
    does: Arc<Mutex<Does>>,
    asked: Arc<Mutex<u32>>,
}

/// Served until the test ends.
pub(crate) struct Served {
    pub(crate) issuer: Issuer,
    pub(crate) channel: Channel,
    _folder: Folder,
}

impl Issuer {
    pub(crate) async fn serve(cell: Cell) -> Served {
        let folder = Folder::new("issuer");
        let listener = UnixListenerStream::new(UnixListener::bind(folder.join("socket")).unwrap());
        let does = Arc::new(Mutex::new(Does::Answer));
        let issuer = Issuer { cell: Arc::new(Mutex::new(cell)), does, asked: Arc::default() };
        let router = tonic::transport::Server::builder().add_service(SvidServer::new(issuer.clone()));
        tokio::spawn(async move { router.serve_with_incoming(listener).await.unwrap() });
        let endpoint = Endpoint::from_shared(format!("unix:{}", folder.join("socket").display())).unwrap();
        Served { issuer, channel: endpoint.connect().await.unwrap(), _folder: folder }
    }
    pub(crate) fn does(&self, does: Does) {
        *self.does.lock().unwrap() = does;
    }
    /// How often it was asked since the last time.
    pub(crate) fn asked(&self) -> u32 {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
    pub(crate) fn with<T>(&self, what: impl FnOnce(&mut Cell) -> T) -> T {
        what(&mut self.cell.lock().unwrap())
    }
}

macro_rules! unasked {
    ($($name:ident($request:ty) -> $response:ty;)*) => {
        #[tonic::async_trait]
        impl Svid for Issuer {
            async fn new_jwtsvid(
                &self,
                request: Request<v1::NewJwtsvidRequest>,
            ) -> Result<Response<v1::NewJwtsvidResponse>, Status> {
                *self.asked.lock().unwrap() += 1;
                let request = request.into_inner();
                assert_eq!(request.request_id.len(), 16);
                let token = match self.does.lock().unwrap().clone() {
                    Does::Answer => self.cell.lock().unwrap().token(&request.entry_id, &request.audience),
                    Does::Refuse(code) => Err(Refusal::new(code, "", "")),
                    Does::Lie(token) => Ok(token),
                };
                let token = token.map_err(|refusal| to_status(&refusal))?;
                Ok(Response::new(v1::NewJwtsvidResponse { token, ..Default::default() }))
            }
            async fn batch_new_x509svid(
                &self,
                request: Request<v1::BatchNewX509svidRequest>,
            ) -> Result<Response<v1::BatchNewX509svidResponse>, Status> {
                *self.asked.lock().unwrap() += 1;
                let result = |item: v1::NewX509svid| match self.cell.lock().unwrap().leaf(&item.entry_id, &item.csr) {
                    Ok(chain_der) => v1::X509svidResult {
                        entry_id: item.entry_id,
                        code: "ok".into(),
                        chain_der,
                        ..Default::default()
                    },
                    Err(refusal) => v1::X509svidResult {
                        entry_id: item.entry_id,
                        code: refusal.code.to_string(),
                        ..Default::default()
                    },
                };
                let results = request.into_inner().items.into_iter().map(result).collect();
                Ok(Response::new(v1::BatchNewX509svidResponse { results }))
            }
            $(async fn $name(&self, _: Request<$request>) -> Result<Response<$response>, Status> {
                Err(Status::unimplemented("not asked here"))
            })*
        }
    };
}

unasked! {
    mint_x509svid(v1::MintX509svidRequest) -> v1::MintX509svidResponse;
    new_intermediate_ca(v1::NewIntermediateCaRequest) -> v1::NewIntermediateCaResponse;
    renew_admin(v1::RenewAdminRequest) -> v1::RenewAdminResponse;
    list_issued(v1::ListIssuedRequest) -> v1::ListIssuedResponse;
    mint_jwtsvid(v1::MintJwtsvidRequest) -> v1::NewJwtsvidResponse;
}
